"use strict";
const film = JSON.parse(document.getElementById("data").textContent);
const box = document.getElementById("film"), slider = document.getElementById("slider");
const where = document.getElementById("where"), play = document.getElementById("play"), speed = document.getElementById("speed");
const last = film.changes.length;
const spans = film.start.map(() => box.appendChild(document.createElement("span")));
const counts = film.counts, most = Math.max(1, ...counts);
const x = (step) => (last ? (1000 * step) / last : 0);
document.querySelector("#curve path").setAttribute(
  "d", counts.map((count, step) => `${step ? "L" : "M"}${x(step)} ${44 - (42 * count) / most}`).join(""));
let timer = 0;

function show(step) {
  step = Math.min(last, Math.max(0, step));
  const ids = film.start.slice();
  for (const change of film.changes.slice(0, step)) for (const [place, id] of change) ids[place] = id;
  const fresh = new Set(step ? film.changes[step - 1].map(([place]) => place) : []);
  ids.forEach((id, place) => {
    spans[place].textContent = film.pieces[id];
    spans[place].className = id === film.mask ? "mask" : fresh.has(place) ? "fresh" : "";
  });
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
