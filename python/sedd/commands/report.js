"use strict";
const film = JSON.parse(document.getElementById("data").textContent);
const box = document.getElementById("film"), slider = document.getElementById("slider");
const where = document.getElementById("where"), play = document.getElementById("play"), speed = document.getElementById("speed");
const last = film.changes.length;
const spans = film.shape ? [] : film.start.map(() => box.appendChild(document.createElement("span")));
const MASK = [150, 180, 235], CHANGED = "#f28c1c", SIDE = 448; // pixels of the longer side of a canvas
const counts = film.counts, most = Math.max(1, ...counts);
const x = (step) => (last ? (1000 * step) / last : 0);
document.querySelector("#curve path").setAttribute(
  "d", counts.map((count, step) => `${step ? "L" : "M"}${x(step)} ${44 - (42 * count) / most}`).join(""));
let timer = 0;

function drawText(ids, fresh) {
  ids.forEach((id, place) => {
    spans[place].textContent = film.pieces[id];
    spans[place].className = id === film.mask ? "mask" : fresh.has(place) ? "fresh" : "";
  });
}

// The canvas has several pixels for each pixel of the image, so that frames are visible around those that have changed.
function drawImage(ids, fresh) {
  const [height, width, channels] = film.shape, context = box.getContext("2d");
  const scale = Math.max(1, Math.floor(SIDE / Math.max(height, width))), line = Math.ceil(scale / 12);
  Object.assign(box, { width: scale * width, height: scale * height });
  context.strokeStyle = CHANGED;
  context.lineWidth = line;
  for (let pixel = 0; pixel < height * width; pixel++) {
    const left = scale * (pixel % width), top = scale * Math.floor(pixel / width), places = [0, 1, 2].map(
      (k) => pixel * channels + (channels === 3 ? k : 0));
    const values = places.map((place, k) => (ids[place] === film.mask ? MASK[k] : ids[place]));
    context.fillStyle = `rgb(${values})`;
    context.fillRect(left, top, scale, scale);
    if (scale > 3 && places.some((place) => fresh.has(place))) {
      context.strokeRect(left + line / 2, top + line / 2, scale - line, scale - line);
    }
  }
}

function show(step) {
  step = Math.min(last, Math.max(0, step));
  const ids = film.start.slice();
  for (const change of film.changes.slice(0, step)) for (const [place, id] of change) ids[place] = id;
  const fresh = new Set(step ? film.changes[step - 1].map(([place]) => place) : []);
  (film.shape ? drawImage : drawText)(ids, fresh);
  slider.value = step;
  where.textContent = `step ${step} of ${last} · ${counts[step]} ${film.counted}`;
  for (const end of ["x1", "x2"]) document.querySelector("#curve line").setAttribute(end, x(step));
  history.replaceState(null, "", `#step=${step}`);
}

function stop() {
  clearTimeout(timer);
  timer = 0;
  play.textContent = "Play";
}

function tick() {
  if (Number(slider.value) >= last) return stop();
  show(Number(slider.value) + 1);
  timer = setTimeout(tick, 1000 / Number(speed.value));
}

function toggle() {
  if (timer) return stop();
  if (Number(slider.value) >= last) show(0);
  play.textContent = "Pause";
  timer = setTimeout(tick, 0);
}

function follow() {
  const asked = /^#step=(\d+)$/.exec(location.hash);
  show(asked ? Number(asked[1]) : last);
}

play.addEventListener("click", toggle);
slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
addEventListener("hashchange", follow);
addEventListener("keydown", (event) => {
  if (event.target !== document.body && event.target !== box) return;
  const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (move) { stop(); show(Number(slider.value) + move); }
  else if (event.key === " ") toggle();
  else return;
  event.preventDefault();
});
follow();
