// The playground: settings in, fabrics out, each drawn by a worker of its own.
//
// A worker takes one step for each message and answers with x_t and the guess of x_0, so to stop or
// to pause is not to send the next one. Engine and weights are loaded at the first click.
"use strict";

const playground = {};  // engine.js and weights.js put themselves in here

(() => {
  const { startingNoise, toPixels, serve } = sampling();
  const MOST = 9;  // fabrics at once
  const CALM_MS = 1000;  // between two pictures, for readers who want less motion
  const folder = new URL(".", document.currentScript.src);
  const root = document.querySelector(".playground");
  const form = root.querySelector("form");
  const fields = form.elements;
  const { stop, another } = fields;
  const list = root.querySelector(".playground-fabrics");
  const status = root.querySelector("[role=status]");
  const calm = window.matchMedia("(prefers-reduced-motion: reduce)");
  const atOnce = Math.min(navigator.hardwareConcurrency || 2, MOST);

  const TOO_OLD = "This browser cannot run the network: it needs WebAssembly with SIMD, "
    + "which browsers have had since 2023. The strip below shows what others see.";
  const FORBIDDEN = "The rules of this server or browser forbid the page to run the network: open "
    + "the lesson from a folder of your own.";
  const NO_MEMORY = "The browser has no memory left for the network: close other tabs, then press "
    + "Draw.";
  const NO_FILE = "A file that belongs to this page did not load: copy the whole folder of the "
    + "lesson, then press Draw again.";
  const PAUSED = "Paused while the page is hidden.";
  const broken = (why) => `The network stopped (${why}): press Draw to begin again.`;

  let network = null;  // a promise of the compiled engine and the weights
  let parts = null;  // what became of it
  let workers = [], queue = [], jobs = [], started = 0, wasPaused = false;

  // ---- Loading, at the first click ----

  const addScript = (name) => new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = new URL(`${name}.js`, folder);
    script.onload = resolve;
    script.onerror = () => reject(new Error(NO_FILE));
    document.head.append(script);
  });

  async function unpack(part) {
    const packed = Uint8Array.from(atob(part.bytes), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  async function loadNetwork() {
    await Promise.all(["engine", "weights"].map(addScript));
    const { engine, weights } = playground;
    const [code, bytes] = await Promise.all([engine, weights].map(unpack)).catch((error) => {
      throw error instanceof RangeError ? error : new Error(NO_FILE);
    });
    const module = await WebAssembly.compile(code).catch((error) => {
      if (error instanceof RangeError) throw error;
      throw new Error(WebAssembly.validate(code) ? FORBIDDEN : TOO_OLD);
    });
    return { module, weights: { ...weights, bytes } };
  }

  function startWorker() {
    const text = `"use strict"; ${sampling}; (${(all) => all.serve(self)})(sampling());`;
    const address = URL.createObjectURL(new Blob([text], { type: "text/javascript" }));
    const worker = new Worker(address);
    URL.revokeObjectURL(address);
    worker.onmessage = ({ data }) => answer(worker, data);
    worker.onerror = ({ message }) => fail(message ? broken(message) : FORBIDDEN);
    worker.fresh = parts;  // go with its first job
    workers.push(worker);
    return worker;
  }

  // ---- Drawing ----

  function assign() {
    try {
      while (queue.length) {
        const mayStart = workers.length < atOnce;
        const free = workers.find((worker) => !worker.job) ?? (mayStart && startWorker());
        if (!free) return;
        free.job = queue.shift();
        const { seed, label, guidance, steps } = free.job;
        free.postMessage({ ...free.fresh, draw: { seed, label, guidance, steps } });
        free.fresh = null;
      }
    } catch (error) {
      return fail(broken(error.message));
    }
    if (jobs.every((job) => job.isOver)) finish();
  }

  function answer(worker, data) {
    const { job } = worker;
    if (data.failed) return fail(data.noMemory ? NO_MEMORY : broken(data.failed));
    if (!job.isOver) show(job, data);
    if (data.step === job.steps) job.isOver = true;
    if (job.isOver) {
      worker.job = null;
      assign();
    } else if (document.hidden) {
      worker.isHeld = wasPaused = true;
      say(PAUSED);
    } else worker.postMessage({});
  }

  function goOn() {
    if (document.hidden) return;
    for (const worker of workers.filter((own) => own.isHeld)) {
      worker.isHeld = false;
      worker.postMessage({});
      say("Drawing.");
    }
  }

  async function begin(wanted) {
    started = performance.now();
    wasPaused = false;
    setDrawing(true);
    say(network ? "Drawing." : "Loading the network.");
    try {
      network ??= loadNetwork();
      parts = await network;
    } catch (error) {
      network = null;
      const isOurs = [NO_FILE, TOO_OLD, FORBIDDEN].includes(error.message);
      if (error instanceof RangeError) return fail(NO_MEMORY);
      return fail(isOurs ? error.message : broken(error.message));
    }
    if (wanted.every((job) => job.isOver)) return;  // stopped meanwhile
    say("Drawing.");
    queue.push(...wanted.filter((job) => !job.isOver));
    assign();
  }

  function halt() {
    for (const job of jobs) job.isOver = true;
    queue = [];
  }

  function finish() {
    if (!isDrawing()) return;
    setDrawing(false);
    const seconds = ((performance.now() - started) / 1000).toFixed(1);
    say(wasPaused ? "Drawn." : `Drawn in ${seconds} seconds.`);
  }

  function fail(sentence) {
    halt();
    for (const worker of workers) worker.terminate();
    workers = [];
    setDrawing(false);
    if (sentence === TOO_OLD) showStill();
    say(sentence);
  }

  // Not `disabled`, which would take the focus away from whoever has just pressed it.
  const setDrawing = (isOn) => stop.setAttribute("aria-disabled", !isOn);
  const isDrawing = () => stop.getAttribute("aria-disabled") === "false";

  // A live region reads out what changes, so it says nothing twice.
  const say = (sentence) => { if (status.textContent !== sentence) status.textContent = sentence; };

  // ---- What is seen ----

  function newJob(seed, label) {
    const card = document.createElement("li");
    const [guidance, steps] = [fields.guidance, fields.steps].map((field) => Number(field.value));
    const job = { seed, label, guidance, steps };
    job.name = [...fields.tradition.options].find((option) => Number(option.value) === label).text;
    job.canvases = [["x", "t"], ["guess of x", "0"]].map(([title, index]) => {
      const figure = document.createElement("figure");
      const canvas = document.createElement("canvas");
      const caption = document.createElement("figcaption");
      canvas.width = canvas.height = 32;
      canvas.setAttribute("role", "img");
      caption.append(title, Object.assign(document.createElement("sub"), { textContent: index }));
      figure.append(canvas, caption);
      card.append(figure);
      return canvas;
    });
    job.caption = document.createElement("p");
    card.append(job.caption);
    list.append(card);
    show(job, { step: 0, x_t: startingNoise(job.seed), x_0: null });
    return job;
  }

  function show(job, state) {
    job.state = state;
    const isBetween = state.step > 0 && state.step < job.steps;
    if (calm.matches && isBetween && performance.now() - job.painted < CALM_MS) return;
    paint(job);
  }

  function paint(job) {
    const { step, x_t, x_0 } = job.state;
    const strength = job.label < 0 ? "" : `, w = ${job.guidance}`;
    job.caption.textContent = `${job.name}${strength}, seed ${job.seed}, step ${step}/${job.steps}`;
    job.painted = performance.now();
    [x_t, x_0].forEach((x, i) => {
      const canvas = job.canvases[i];
      const what = i ? "The guess of x_0" : "x_t";
      canvas.setAttribute("aria-label", `${what} of ${job.name}, seed ${job.seed}, step ${step}`);
      if (x) canvas.getContext("2d").putImageData(new ImageData(toPixels(x), 32), 0, 0);
    });
  }

  // ---- Buttons ----

  function draw(event) {
    event.preventDefault();
    halt();
    list.replaceChildren();
    const { tradition, seed, count } = fields;
    const first = Number(seed.value), label = Number(tradition.value);
    jobs = Array.from({ length: Number(count.value) }, (_, i) => newJob(first + i, label));
    begin(jobs);
  }

  function stopHere() {
    if (!isDrawing()) return;
    halt();
    setDrawing(false);
    jobs.forEach(paint);
    const steps = new Set(jobs.map((job) => job.state.step));
    say(steps.size === 1 ? `Stopped at step ${[...steps]}.` : "Stopped.");
  }

  // The last fabric's noise once more, with the next tradition of the list.
  function drawAnother() {
    if (!jobs.length && !form.reportValidity()) return;
    if (jobs.length === MOST) return say("Nine fabrics are the most: press Draw to begin again.");
    const { tradition, seed } = fields;
    tradition.value = (Number(tradition.value) + 1) % (tradition.options.length - 1);
    jobs.push(newJob(jobs.at(-1)?.seed ?? Number(seed.value), Number(tradition.value)));
    begin(jobs.slice(-1));
  }

  function showStill() {
    form.hidden = true;
    list.replaceChildren();
    root.querySelector(".playground-still").hidden = false;
  }

  form.addEventListener("submit", draw);
  another.addEventListener("click", drawAnother);
  stop.addEventListener("click", stopHere);
  document.addEventListener("visibilitychange", goOn);
  for (const input of form.querySelectorAll("input[type=range]")) {
    const showValue = () => { input.labels[0].querySelector("span").textContent = input.value; };
    input.addEventListener("input", showValue);
    showValue();
  }
  setDrawing(false);
  root.querySelector(".playground-live").hidden = false;
  root.querySelector(".playground-still").hidden = true;
  if (typeof WebAssembly !== "object" || typeof DecompressionStream !== "function") {
    showStill();
    say(TOO_OLD);
  }
})();
