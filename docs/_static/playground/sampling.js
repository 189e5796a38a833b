// From noise to a fabric: the times, the guess of x_0 and the step of ddpm_basics/sampling.py.
//
// All of it stands in one function, whose text the page hands to its workers: a page that was
// opened as a file may not load a worker's script from another one. Tests run it under Node. A
// picture is 32 rows of 32 pixels of red, green, blue, in [-1, 1], x_t beyond it by the noise.
"use strict";

function sampling() {
  const SIZE = 32 * 32 * 3, DIM = 32, TIME = 4 * DIM;
  const NOISIEST = -4, CLEANEST = 3;  // lambda = log(alpha / sigma)

  // ---- The network: unet.c as WebAssembly, its weights behind its own memory ----

  // weights: alpha and sigma of each timestep, a vector for each label, then what unet() reads.
  // seen(at, side, channels) is called after each layer, for tests.
  function openNetwork(module, { bytes, timesteps, labels }, seen = () => {}) {
    const { exports } = new WebAssembly.Instance(module, { env: { seen } });
    const { memory } = exports;
    const start = memory.buffer.byteLength;
    memory.grow(Math.ceil(bytes.length / 65536));
    new Uint8Array(memory.buffer).set(bytes, start);
    const floats = (at, count) => new Float32Array(memory.buffer, at, count);
    const after = (count) => start + 4 * count;
    const picture = floats(exports.picture_at(), SIZE);
    const waves = floats(exports.waves_at(), DIM);
    const told = floats(exports.label_at(), TIME);
    const table = floats(after(2 * timesteps), labels.length * TIME);

    // v at x_t, as a view of the network's memory that the next call overwrites.
    function evaluate(x_t, t, label) {
      picture.set(x_t);
      for (let i = 0; i < DIM / 2; i++) {
        const angle = t * Math.exp((-i * Math.log(10000)) / (DIM / 2 - 1));
        waves[i] = Math.sin(angle);
        waves[i + DIM / 2] = Math.cos(angle);
      }
      if (label < 0) told.fill(0);
      else told.set(table.subarray(label * TIME, (label + 1) * TIME));
      exports.unet(after(2 * timesteps + labels.length * TIME));
      return picture;
    }

    // t = -1 is the clean image.
    const alpha = [...floats(start, timesteps)], sigma = [...floats(after(timesteps), timesteps)];
    alpha[-1] = 1;
    sigma[-1] = 0;
    return { memory, evaluate, levels: { alpha, sigma, timesteps } };
  }

  const logSnr = ({ alpha, sigma }, t) => Math.log(alpha[t] / sigma[t]);

  // ---- Noise from a seed ----

  // A counter, stirred as MurmurHash3 ends (Appleby): whole numbers below 2^32.
  function stir(h) {
    h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
    h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
    return (h ^ (h >>> 16)) >>> 0;
  }

  // Two uniform numbers make two Gaussian ones (Box & Muller 1958).
  function startingNoise(seed) {
    const x_T = new Float32Array(SIZE), first = stir(seed + 1);
    const uniform = (i) => (stir(first + i) + 0.5) / 2 ** 32;
    for (let i = 0; i < SIZE; i += 2) {
      const length = Math.sqrt(-2 * Math.log(uniform(i))), angle = 2 * Math.PI * uniform(i + 1);
      x_T[i] = length * Math.cos(angle);
      x_T[i + 1] = length * Math.sin(angle);
    }
    return x_T;
  }

  // ---- The walk ----

  // Times from T - 1 down, evenly in lambda; then -1.
  function logSnrTimes(levels, steps) {
    const start = levels.timesteps - 1;
    const place = Array.from({ length: start + 1 }, (_, t) => logSnr(levels, t));
    const noisiest = Math.max(place[start], NOISIEST), cleanest = Math.min(place[0], CLEANEST);
    const times = [start];
    for (let i = 1; i < steps; i++) {
      const wanted = noisiest + ((cleanest - noisiest) * i) / (steps - 1);
      let nearest = 0;
      place.forEach((own, t) => {
        if (Math.abs(own - wanted) < Math.abs(place[nearest] - wanted)) nearest = t;
      });
      // Each time once, also where steps are many, and enough of them left for the rest.
      times.push(Math.max(Math.min(nearest, times[i - 1] - 1), steps - 1 - i));
    }
    return [...times, -1];
  }

  // x_0 = alpha x_t - sigma v, with v guided without a classifier (Ho & Salimans 2022):
  // without label + guidance x (with label - without label).
  function predictX0({ evaluate, levels }, x_t, t, label, guidance) {
    const isGuided = label >= 0 && guidance !== 0 && guidance !== 1;
    const without = isGuided ? evaluate(x_t, t, -1).slice() : null;
    const told = evaluate(x_t, t, guidance === 0 ? -1 : label);
    return x_t.map((x, i) => {
      const v = isGuided ? without[i] + guidance * (told[i] - without[i]) : told[i];
      if (!Number.isFinite(v)) throw new Error(`the network's answer at t = ${t} is not finite`);
      return Math.min(Math.max(levels.alpha[t] * x - levels.sigma[t] * v, -1), 1);
    });
  }

  // From x_t to x_s: DPM-Solver++ (3M), a parabola through the last three guesses of x_0.
  // past: the two guesses before this one and their times, the latest first, or fewer.
  function dpmppStep(levels, x_t, x_0, t, s, past) {
    if (s < 0) return x_0;
    const { alpha, sigma } = levels;
    const h = logSnr(levels, s) - logSnr(levels, t);
    const phi2 = Math.expm1(-h) / h + 1, phi3 = (2 * phi2) / h - 1;
    const [x_1, t_1] = past[0] ?? [], [x_2, t_2] = past[1] ?? [];
    const h_1 = x_1 && logSnr(levels, t) - logSnr(levels, t_1);
    const h_2 = x_2 && logSnr(levels, t_1) - logSnr(levels, t_2);
    return x_t.map((x, i) => {
      let slope = 0, bend = 0;
      if (x_1) slope = (x_0[i] - x_1[i]) / h_1;
      if (x_2) {
        bend = (slope - (x_1[i] - x_2[i]) / h_2) / (h_1 + h_2);
        slope += h_1 * bend;
      }
      const x_s = (sigma[s] / sigma[t]) * x - alpha[s] * Math.expm1(-h) * x_0[i];
      return x_s + alpha[s] * h * (phi2 * slope - phi3 * h * bend);
    });
  }

  // Every step of one fabric; step 0 is the noise. label: a number, or -1 for none.
  function* denoise(network, x_T, label, guidance, steps) {
    const times = logSnrTimes(network.levels, steps);
    let x_t = x_T, past = [];
    yield { step: 0, t: times[0], x_t, x_0: null };
    for (let i = 0; i < steps; i++) {
      const t = times[i], s = times[i + 1];
      const x_0 = predictX0(network, x_t, t, label, guidance);
      x_t = dpmppStep(network.levels, x_t, x_0, t, s, past);
      past = [[x_0, t], ...past.slice(0, 1)];
      yield { step: i + 1, t, x_t, x_0 };
    }
  }

  // Red, green, blue, opaque: what a canvas takes.
  function toPixels(x) {
    const pixels = new Uint8ClampedArray((SIZE / 3) * 4).fill(255);
    x.forEach((value, i) => { pixels[i + Math.floor(i / 3)] = ((value + 1) / 2) * 255; });
    return pixels;
  }

  // What a worker does: open the network, then take one step for each message.
  function serve(scope) {
    let network, walk;
    scope.onmessage = ({ data }) => {
      try {
        if (data.module) network = openNetwork(data.module, data.weights);
        if (data.draw) {
          const { seed, label, guidance, steps } = data.draw;
          walk = denoise(network, startingNoise(seed), label, guidance, steps);
        }
        scope.postMessage(walk.next().value);
      } catch (error) {
        scope.postMessage({ failed: error.message, noMemory: error instanceof RangeError });
      }
    };
  }

  return { openNetwork, startingNoise, logSnrTimes, denoise, toPixels, serve };
}

if (typeof module === "object") module.exports = sampling();
