// Sliders, quiz and the morph's start. Without this script a page shows still figures, and every
// quiz question its folded explanation.
"use strict";

const calm = window.matchMedia("(prefers-reduced-motion: reduce)");
const FRAME_MS = 120;

function startSlider(figure) {
  const count = Number(figure.dataset.frames);
  const readouts = JSON.parse(figure.dataset.readouts);
  const strip = figure.querySelector(".slider-strip");
  const range = figure.querySelector("input[type=range]");
  const button = figure.querySelector(".slider-play");
  const list = figure.querySelector(".slider-readout");
  let timer = null;

  const values = readouts[0].map(([label]) => {
    const pair = document.createElement("div");
    const term = document.createElement("dt");
    const value = document.createElement("dd");
    term.textContent = label;
    pair.append(term, value);
    list.append(pair);
    return value;
  });

  function show() {
    const frame = Number(range.value);
    strip.style.transform = `translateX(${(-100 * frame) / count}%)`;
    readouts[frame].forEach(([, text], i) => { values[i].textContent = text; });
    range.setAttribute("aria-valuetext", readouts[frame].map((pair) => pair.join(" ")).join(", "));
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    button.textContent = "Play";
    button.setAttribute("aria-label", "Play the frames of this slider");
  }

  function play() {
    if (Number(range.value) === count - 1) range.value = 0;
    button.textContent = "Pause";
    button.setAttribute("aria-label", "Pause the frames of this slider");
    timer = setInterval(() => {
      range.value = Number(range.value) + 1;
      show();
      if (Number(range.value) === count - 1) stop();
    }, Math.max(FRAME_MS, 4000 / count));
  }

  range.addEventListener("input", () => { if (timer) stop(); show(); });
  button.addEventListener("click", () => (timer ? stop() : play()));
  const obey = () => { if (calm.matches) stop(); button.hidden = calm.matches; };
  calm.addEventListener("change", obey);

  figure.querySelector(".slider-still").hidden = true;
  figure.querySelector(".slider-live").hidden = false;
  obey();
  show();
}

function startQuiz(question) {
  const verdict = question.querySelector(".quiz-verdict");
  question.addEventListener("change", (event) => {
    if (event.target.type !== "radio") return;
    const right = event.target.value === question.dataset.answer;
    verdict.textContent = right ? "Right." : "Not quite. Think again, or open the explanation.";
    question.dataset.verdict = right ? "right" : "wrong";
  });
}

function startMorph(video) {
  const obey = () => { if (calm.matches) video.pause(); else video.play().catch(() => {}); };
  calm.addEventListener("change", obey);
  obey();
}

// What is too wide scrolls inside its own box, and a box that scrolls has to take the focus.
function markScrollBoxes() {
  document.querySelectorAll(".scroll-box").forEach((box) => {
    const scrolls = box.scrollWidth > box.clientWidth;
    for (const [name, value] of [["tabindex", "0"], ["role", "group"], ["aria-label", box.dataset.label]]) {
      if (scrolls) box.setAttribute(name, value); else box.removeAttribute(name);
    }
  });
}

new ResizeObserver(markScrollBoxes).observe(document.body);
document.fonts.ready.then(markScrollBoxes);
document.querySelectorAll(".slider").forEach(startSlider);
document.querySelectorAll(".quiz").forEach(startQuiz);
document.querySelectorAll("video.morph").forEach(startMorph);
