// The playground's network: one evaluation of the U-Net of denoising_diffusion_pytorch, in fp32.
//
// Why not onnxruntime-web? It did the same, from a file too, but it takes five megabytes of page
// where this takes seven kilobytes, two seconds before the first step, and four times as long for
// each.
//
// Rebuild with `python docs/make_playground.py`, which also writes the weights. They stand in the
// order in which this file takes them, so that a cursor finds each one. Convolutions and linear
// layers are int8 with a scale for each output channel; they are unpacked eight output channels at
// a time, just before use. A map has its channels last: at[(y * side + x) * channels + c].

typedef float f4 __attribute__((vector_size(16), aligned(4)));
typedef int i4 __attribute__((vector_size(16)));
typedef signed char b4 __attribute__((vector_size(4), aligned(1)));

enum { SIDE = 32, COLOURS = 3, DIM = 32, STAGES = 4, TIME = 4 * DIM };
enum { HEADS = 4, HEAD = 32, HIDDEN = HEADS * HEAD, MEMORY = 4 };  // of the attentions
enum { TILE = 8 };                                                 // output channels at once
static const int WIDTHS[STAGES + 1] = {DIM, DIM, 2 * DIM, 2 * DIM, 4 * DIM};

typedef struct {
    int side, channels;
    float *at;
} Map;

// ---- Space and weights -----------------------------------------------------------------------

static float space[2 << 20];  // maps, one behind the other; a block gives back what it needed
static float *next_free;
static float padded[34 * 34 * 64], tile_weights[9 * 192 * TILE];
static const signed char *cursor;

// Tells a test what a layer made of its input; the browser passes a function that does nothing.
__attribute__((import_name("seen"))) void seen(const float *at, int side, int channels);

static float *take_space(int count) {
    float *taken = next_free;
    next_free += count;
    if (next_free > space + sizeof space / sizeof *space) __builtin_trap();
    return taken;
}

static Map new_map(int side, int channels) {
    return (Map){side, channels, take_space(side * side * channels)};
}

static const float *take_floats(int count) {
    const float *taken = (const float *)cursor;
    cursor += 4 * count;
    return taken;
}

static int length(Map map) { return map.side * map.side * map.channels; }

// ---- Arithmetic ------------------------------------------------------------------------------

// e^x to the last bit or two: 2^n times a polynomial in what is left, at most half of log 2.
static f4 exp4(f4 x) {
    x = __builtin_wasm_min_f32x4(__builtin_wasm_max_f32x4(x, (f4){} - 87), (f4){} + 87);
    f4 n = __builtin_elementwise_floor(x * 1.44269504f + 0.5f);
    f4 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    f4 p = ((r * (1.f / 720) + 1.f / 120) * r + 1.f / 24) * r + 1.f / 6;
    p = (p * r + 0.5f) * r * r + r + 1;
    i4 power = (__builtin_convertvector(n, i4) + 127) << 23;
    return p * (f4)power;
}

static f4 silu(f4 x) { return x / (1 + exp4(-x)); }

// x times the normal distribution's share below x; erf as in Abramowitz & Stegun 7.1.26.
static f4 gelu(f4 x) {
    f4 z = __builtin_elementwise_abs(x) * 0.70710678f, k = 1 / (1 + 0.3275911f * z);
    f4 tail = 1.061405429f * k - 1.453152027f;
    tail = ((tail * k + 1.421413741f) * k - 0.284496736f) * k + 0.254829592f;
    tail *= k * exp4(-z * z);
    return __builtin_wasm_max_f32x4(x, (f4){}) - __builtin_elementwise_abs(x) * 0.5f * tail;
}

static float sum4(f4 x) { return x[0] + x[1] + x[2] + x[3]; }

#define EACH4(i, count) for (int i = 0; i < (count); i += 4)
#define F4(pointer) (*(f4 *)(pointer))

static void add(Map x, const float *other) { EACH4(i, length(x)) F4(x.at + i) += F4(other + i); }

// ---- Convolution -----------------------------------------------------------------------------

// Surround a map with zeros, for kernels that reach over its edge.
static Map pad(Map x, int reach) {
    Map wide = {x.side + 2 * reach, x.channels, padded};
    __builtin_memset(padded, 0, 4 * length(wide));
    for (int y = 0; y < x.side; y++)
        __builtin_memcpy(padded + ((y + reach) * wide.side + reach) * x.channels,
                         x.at + y * x.side * x.channels, 4 * x.side * x.channels);
    return wide;
}

// Eight output channels of `pixels` neighbours: a matrix product whose sums stay in registers.
// A row of the kernel meets a row of the map in `row` numbers that lie side by side.
static inline __attribute__((always_inline)) void tile(
    float *out, int out_step, const float *in, int in_step, int in_row, int kernel, int row,
    const float *bias, const int pixels) {
    f4 low[4], high[4];
    for (int i = 0; i < pixels; i++) low[i] = F4(bias), high[i] = F4(bias + 4);
    const float *weight = tile_weights;
    for (int ky = 0; ky < kernel; ky++, in += in_row)
        for (int k = 0; k < row; k++, weight += TILE) {
            f4 first = F4(weight), second = F4(weight + 4);
            for (int i = 0; i < pixels; i++) {
                low[i] += in[i * in_step + k] * first;
                high[i] += in[i * in_step + k] * second;
            }
        }
    for (int i = 0; i < pixels; i++) {
        F4(out + i * out_step) = low[i];
        F4(out + i * out_step + 4) = high[i];
    }
}

// A convolution with a square kernel of 2 reach + 1; with reach 0 on a side of 1, a linear layer.
static Map conv(Map x, int channels, int reach) {
    Map wide = reach ? pad(x, reach) : x, out = new_map(x.side, channels);
    int kernel = 2 * reach + 1, row = kernel * x.channels, in_row = wide.side * x.channels;
    for (int c = 0; c < channels; c += TILE) {
        const float *scale = take_floats(TILE), *bias = take_floats(TILE);
        EACH4(i, kernel * row * TILE)
            F4(tile_weights + i) = __builtin_convertvector(*(b4 *)(cursor + i), f4) *
                                   F4(scale + i % TILE);
        cursor += kernel * row * TILE;
        for (int y = 0; y < x.side; y++)
            for (int at = 0; at < x.side; at += 4) {
                float *to = out.at + (y * x.side + at) * channels + c;
                const float *from = wide.at + y * in_row + at * x.channels;
                if (x.side == 1)
                    tile(to, channels, from, x.channels, in_row, kernel, row, bias, 1);
                else
                    tile(to, channels, from, x.channels, in_row, kernel, row, bias, 4);
            }
    }
    return out;
}

// ---- Blocks ----------------------------------------------------------------------------------

// Give each pixel's channels the length sqrt(channels), then a factor each: x / |x| * g * sqrt.
static void rms_norm(Map x, Map out) {
    const float *g = take_floats(x.channels);
    for (int p = 0; p < x.side * x.side; p++) {
        float *from = x.at + p * x.channels, *to = out.at + p * x.channels;
        f4 squares = {};
        EACH4(c, x.channels) squares += F4(from + c) * F4(from + c);
        float norm = __builtin_sqrtf(sum4(squares));
        float factor = __builtin_sqrtf(x.channels) / (norm > 1e-12f ? norm : 1e-12f);
        EACH4(c, x.channels) F4(to + c) = F4(from + c) * factor * F4(g + c);
    }
}

// Convolution, norm, the timestep's and the label's scale and shift (or none), SiLU.
static Map block(Map x, int channels, const float *scale_shift) {
    Map h = conv(x, channels, 1);
    rms_norm(h, h);
    for (int p = 0; p < h.side * h.side; p++)
        EACH4(c, channels) {
            f4 value = F4(h.at + p * channels + c);
            if (scale_shift)
                value = value * (F4(scale_shift + c) + 1) + F4(scale_shift + channels + c);
            F4(h.at + p * channels + c) = silu(value);
        }
    return h;
}

static Map resnet_block(Map x, int channels, Map time) {
    Map out = new_map(x.side, channels);
    float *mark = next_free;
    Map scale_shift = conv(time, 2 * channels, 0);
    Map h = block(block(x, channels, scale_shift.at), channels, 0);
    Map straight = x.channels == channels ? x : conv(x, channels, 0);
    EACH4(i, length(out)) F4(out.at + i) = F4(h.at + i) + F4(straight.at + i);
    next_free = mark;
    seen(out.at, out.side, out.channels);
    return out;
}

// Queries, keys and values of all heads, [pixels][HIDDEN] each; to keys and values belong a few
// learned ones that every picture shares. They come first.
typedef struct {
    int pixels, keys;
    float *q, *k, *v;
} Heads;

static Heads ask(Map x) {
    Map normed = new_map(x.side, x.channels);
    rms_norm(x, normed);
    const float *memory = take_floats(2 * MEMORY * HIDDEN);
    Map qkv = conv(normed, 3 * HIDDEN, 0);
    int pixels = x.side * x.side;
    int keys = MEMORY + pixels;
    Heads heads = {pixels, keys, take_space(pixels * HIDDEN), take_space(keys * HIDDEN),
                   take_space(keys * HIDDEN)};
    __builtin_memcpy(heads.k, memory, 4 * MEMORY * HIDDEN);
    __builtin_memcpy(heads.v, memory + MEMORY * HIDDEN, 4 * MEMORY * HIDDEN);
    for (int p = 0; p < pixels; p++) {
        const float *from = qkv.at + p * 3 * HIDDEN;
        __builtin_memcpy(heads.q + p * HIDDEN, from, 4 * HIDDEN);
        __builtin_memcpy(heads.k + (MEMORY + p) * HIDDEN, from + HIDDEN, 4 * HIDDEN);
        __builtin_memcpy(heads.v + (MEMORY + p) * HIDDEN, from + 2 * HIDDEN, 4 * HIDDEN);
    }
    return heads;
}

// In place, over `count` numbers side by side.
static void softmax(float *x, int count) {
    float most = x[0], sum = 0;
    for (int i = 1; i < count; i++) most = x[i] > most ? x[i] : most;
    EACH4(i, count) F4(x + i) = exp4(F4(x + i) - most);
    EACH4(i, count) sum += sum4(F4(x + i));
    EACH4(i, count) F4(x + i) /= sum;
}

// Every pixel looks at every other (Vaswani et al. 2017).
static void full_attention(Heads heads, Map out) {
    static float scores[MEMORY + 16];
    for (int h = 0; h < HIDDEN; h += HEAD)
        for (int p = 0; p < heads.pixels; p++) {
            const float *q = heads.q + p * HIDDEN + h;
            for (int n = 0; n < heads.keys; n++) {
                f4 product = {};
                EACH4(d, HEAD) product += F4(q + d) * F4(heads.k + n * HIDDEN + h + d);
                scores[n] = sum4(product) / __builtin_sqrtf(HEAD);
            }
            softmax(scores, heads.keys);
            EACH4(e, HEAD) {
                f4 sum = {};
                for (int n = 0; n < heads.keys; n++)
                    sum += scores[n] * F4(heads.v + n * HIDDEN + h + e);
                F4(out.at + p * HIDDEN + h + e) = sum;
            }
        }
}

// Keys meet values once, in a small table that every pixel asks (Shen et al. 2021).
static void linear_attention(Heads heads, Map out) {
    EACH4(c, HIDDEN) {  // softmax of the keys, over the pixels
        f4 most = F4(heads.k + c), sum = {};
        for (int n = 1; n < heads.keys; n++)
            most = __builtin_wasm_max_f32x4(most, F4(heads.k + n * HIDDEN + c));
        for (int n = 0; n < heads.keys; n++)
            sum += F4(heads.k + n * HIDDEN + c) = exp4(F4(heads.k + n * HIDDEN + c) - most);
        for (int n = 0; n < heads.keys; n++) F4(heads.k + n * HIDDEN + c) /= sum;
    }
    for (int h = 0; h < HIDDEN; h += HEAD) {
        static float table[HEAD * HEAD];
        __builtin_memset(table, 0, sizeof table);
        for (int n = 0; n < heads.keys; n++)
            for (int d = 0; d < HEAD; d++)
                EACH4(e, HEAD)
                    F4(table + d * HEAD + e) += heads.k[n * HIDDEN + h + d] *
                                                F4(heads.v + n * HIDDEN + h + e);
        for (int p = 0; p < heads.pixels; p++) {
            float *q = heads.q + p * HIDDEN + h;
            softmax(q, HEAD);
            f4 sums[HEAD / 4] = {};
            for (int d = 0; d < HEAD; d++)
                EACH4(e, HEAD) sums[e / 4] += q[d] * F4(table + d * HEAD + e);
            EACH4(e, HEAD)
                F4(out.at + p * HIDDEN + h + e) = sums[e / 4] / __builtin_sqrtf(HEAD);
        }
    }
}

// Attention with its norms; its input is added to what it finds.
static Map attend(Map x, int is_full) {
    Map out = new_map(x.side, x.channels);
    float *mark = next_free;
    Heads heads = ask(x);
    Map found = new_map(x.side, HIDDEN);
    if (is_full) full_attention(heads, found); else linear_attention(heads, found);
    Map answer = conv(found, x.channels, 0);
    if (!is_full) rms_norm(answer, answer);
    __builtin_memcpy(out.at, answer.at, 4 * length(out));
    add(out, x.at);
    next_free = mark;
    seen(out.at, out.side, out.channels);
    return out;
}

// Four neighbours become one pixel of four times the channels.
static Map halve(Map x) {
    Map out = new_map(x.side / 2, 4 * x.channels);
    int pair = 2 * x.channels;
    for (int y = 0; y < x.side; y++)
        for (int at = 0; at < out.side; at++)
            __builtin_memcpy(out.at + (y / 2 * out.side + at) * 2 * pair + y % 2 * pair,
                             x.at + (y * out.side + at) * pair, 4 * pair);
    return out;
}

// Each pixel becomes four.
static Map twice(Map x) {
    Map out = new_map(2 * x.side, x.channels);
    for (int y = 0; y < out.side; y++)
        for (int at = 0; at < out.side; at++)
            __builtin_memcpy(out.at + (y * out.side + at) * x.channels,
                             x.at + (y / 2 * x.side + at / 2) * x.channels, 4 * x.channels);
    return out;
}

// Two maps as one, the channels of the second behind those of the first.
static Map join(Map x, Map other) {
    Map out = new_map(x.side, x.channels + other.channels);
    for (int p = 0; p < x.side * x.side; p++) {
        float *to = out.at + p * out.channels;
        __builtin_memcpy(to, x.at + p * x.channels, 4 * x.channels);
        __builtin_memcpy(to + x.channels, other.at + p * other.channels, 4 * other.channels);
    }
    return out;
}

// ---- The network -----------------------------------------------------------------------------

static float picture[SIDE * SIDE * COLOURS];  // x_t comes in here, and v goes out
static float waves[DIM];                      // sine and cosine of the timestep
static float label[TIME];                     // what a label adds to the timestep; zeros for none

float *picture_at(void) { return picture; }
float *waves_at(void) { return waves; }
float *label_at(void) { return label; }

// The timestep's embedding, the label added, ready for the layers that take it in.
static Map embed(void) {
    Map time = conv((Map){1, DIM, waves}, TIME, 0);
    EACH4(i, TIME) F4(time.at + i) = gelu(F4(time.at + i));
    time = conv(time, TIME, 0);
    add(time, label);
    EACH4(i, TIME) F4(time.at + i) = silu(F4(time.at + i));
    return time;
}

// Evaluate v(x_t, t, label) in place; `weights` is where the file of weights begins.
void unet(const signed char *weights) {
    Map kept[2 * STAGES];
    int count = 0;
    cursor = weights;
    next_free = space;
    Map time = embed();
    Map x = conv((Map){SIDE, COLOURS, picture}, DIM, 3), first = x;
    seen(x.at, x.side, x.channels);

    for (int i = 0; i < STAGES; i++) {
        int is_last = i == STAGES - 1;
        x = kept[count++] = resnet_block(x, WIDTHS[i], time);
        x = resnet_block(x, WIDTHS[i], time);
        x = kept[count++] = attend(x, is_last);
        x = is_last ? conv(x, WIDTHS[i + 1], 1) : conv(halve(x), WIDTHS[i + 1], 0);
    }
    x = resnet_block(x, WIDTHS[STAGES], time);
    x = attend(x, 1);
    x = resnet_block(x, WIDTHS[STAGES], time);
    for (int i = STAGES; i > 0; i--) {
        x = resnet_block(join(x, kept[--count]), WIDTHS[i], time);
        x = resnet_block(join(x, kept[--count]), WIDTHS[i], time);
        x = attend(x, i == STAGES);
        x = conv(i == 1 ? x : twice(x), WIDTHS[i - 1], 1);
    }
    x = resnet_block(join(x, first), DIM, time);
    x = conv(x, TILE, 0);  // its last channels are there to fill the tile
    for (int i = 0; i < SIDE * SIDE * COLOURS; i++)
        picture[i] = x.at[i / COLOURS * TILE + i % COLOURS];
}
