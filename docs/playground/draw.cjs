// The playground's engine under Node: a list of jobs comes in as JSON, 32-bit floats go out.
//
// A job with steps draws a fabric: {seed or x_T, label, guidance, steps}, and `all` for every
// step's x_t and guess of x_0. One with t evaluates the network once: {x_t, t, label} gives what
// each layer made of it, then v. One with times gives the times of so many steps, one with noise
// that seed's x_T.
"use strict";

const fs = require("fs");
const path = require("path");
const vm = require("vm");
const zlib = require("zlib");

const assets = path.join(__dirname, "..", "_static", "playground");
const sampling = require(path.join(assets, "sampling.js"));
const { openNetwork, startingNoise, logSnrTimes, denoise } = sampling;

const playground = {};
for (const name of ["engine", "weights"]) {
  vm.runInNewContext(fs.readFileSync(path.join(assets, `${name}.js`), "utf8"), { playground });
}
const unpack = (text) => zlib.gunzipSync(Buffer.from(text, "base64"));
const { engine, weights } = playground;

const layers = [];
const seen = (at, side, channels) => {
  const { buffer } = network.memory;
  if (layers.wanted) layers.push(new Float32Array(buffer, at, side * side * channels).slice());
};
const network = openNetwork(
  new WebAssembly.Module(unpack(engine.bytes)), { ...weights, bytes: unpack(weights.bytes) }, seen,
);

function run(job) {
  if (job.times) return [Float32Array.from(logSnrTimes(network.levels, job.times))];
  if (job.noise !== undefined) return [startingNoise(job.noise)];
  if (job.t !== undefined) {
    layers.length = 0;
    layers.wanted = true;
    const v = network.evaluate(job.x_t, job.t, job.label).slice();
    layers.wanted = false;
    return [...layers, v];
  }
  const x_T = job.x_T ? Float32Array.from(job.x_T) : startingNoise(job.seed);
  const steps = [...denoise(network, x_T, job.label, job.guidance, job.steps)];
  if (job.all) return steps.flatMap(({ x_t, x_0 }) => [x_t, x_0 ?? new Float32Array(x_t.length)]);
  return [steps.at(-1).x_t];
}

const out = JSON.parse(fs.readFileSync(0, "utf8")).flatMap(run);
for (const { buffer, byteOffset, byteLength } of out) {
  process.stdout.write(Buffer.from(buffer, byteOffset, byteLength));
}
