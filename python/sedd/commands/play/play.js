// The page of sedd play: sends the form to /v1/completions and shows the events of the answer.
"use strict";

const form = document.getElementById("form");
const [prompt_, gap, gapSize, run, stop, link, progress, status_, texts, params, legend] = [
  "prompt", "gap", "gap-size", "run", "stop", "link", "progress", "status", "texts", "params", "legend",
].map((id) => document.getElementById(id));
const [imageFields, showValid, valid, file] = ["image-fields", "show-valid", "valid", "file"].map((id) =>
  document.getElementById(id),
);
const LONGEST_LINK = 8000; // characters
const NUMBERS = ["steps", "temperature", "top_p", "n", "seed", "label", "guidance"];
let model = null;
let painter = null; // of a model of images
const UNREACHABLE = "The server does not answer. Is sedd play still running?";
let running = null; // an AbortController

function say(text, isError = false) {
  status_.textContent = text;
  status_.classList.toggle("error", isError);
}

// ---- the form ----

function showParameters(values = {}) {
  params.replaceChildren(
    ...Object.entries(model.samplers[form.sampler.value] ?? {}).map(([name, usual]) => {
      const label = document.createElement("label");
      const input = document.createElement("input");
      input.dataset.parameter = name;
      input.placeholder = usual;
      input.value = values[name] ?? "";
      label.append(name, input);
      return label;
    }),
  );
}

function readForm() {
  const body = { sampler: form.sampler.value, entropy: form.entropy.checked };
  if (painter === null) body.prompt = prompt_.value;
  else if (painter.name !== null) Object.assign(body, { image: painter.name, mask: painter.ranges() });
  for (const name of NUMBERS) {
    const isUsed = model.classes > 0 || !["label", "guidance"].includes(name);
    if (form[name].value !== "" && isUsed) body[name] = Number(form[name].value);
  }
  const given = {};
  for (const input of params.querySelectorAll("input")) {
    if (input.value !== "") given[input.dataset.parameter] = input.value;
  }
  if (Object.keys(given).length > 0) body.sampler_params = given;
  return body;
}

function fillForm(query) {
  if (query.has("prompt")) prompt_.value = query.get("prompt");
  if (query.has("sampler") && query.get("sampler") in model.samplers) form.sampler.value = query.get("sampler");
  for (const name of NUMBERS) if (query.has(name)) form[name].value = query.get(name);
  if (query.has("entropy")) form.entropy.checked = query.get("entropy") === "true";
  showParameters(readLink(query, "sampler_params", {}));
}

// The text of a link as JSON, or what stands for nothing if it cannot be read.
function readLink(query, name, nothing) {
  try {
    return JSON.parse(query.get(name)) ?? nothing;
  } catch {
    say(`The link has a value of ${name} that cannot be read.`, true);
    return nothing;
  }
}

function permalink(body) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(body)) {
    query.set(name, typeof value === "object" ? JSON.stringify(value) : String(value));
  }
  return `${location.pathname}?${query}`;
}

gap.addEventListener("click", () => {
  const size = Math.max(1, Math.floor(Number(gapSize.value) || 1));
  prompt_.setRangeText(`{{${size}}}`, prompt_.selectionStart, prompt_.selectionEnd, "end");
  prompt_.focus();
});
form.sampler.addEventListener("change", () => showParameters());
link.addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(location.href);
    say("Link copied.");
  } catch {
    say("The address of this page is the link.");
  }
});
stop.addEventListener("click", () => running?.abort());

// ---- the texts ----

// The element of a text, or the canvas of an image with a button.
function makeResult(isText) {
  if (isText) {
    const shown = document.createElement("p");
    shown.className = "text";
    return shown;
  }
  const [shown, canvas, button] = ["div", "canvas", "button"].map((kind) => document.createElement(kind));
  shown.className = "image";
  Object.assign(button, { type: "button", textContent: "Paint on this", disabled: true });
  shown.append(canvas, button);
  return shown;
}

function showFrame(frame) {
  const isText = model.shape.length === 0;
  while (texts.children.length > frame.pieces.length) texts.lastChild.remove();
  while (texts.children.length < frame.pieces.length) texts.append(makeResult(isText));
  frame.pieces.forEach((pieces, i) => {
    if (!isText) {
      const [canvas, button] = texts.children[i].children;
      drawImage(canvas, model, pieces, frame.masked[i], frame.entropy === null ? null : frame.entropy[i]);
      button.onclick = () => startPainting(pieces, pieces);
      return;
    }
    const spans = [];
    let last = null; // neighbours that look the same share an element
    pieces.forEach((piece, k) => {
      const entropy = frame.entropy === null ? null : frame.entropy[i][k];
      const isGiven = frame.given[k];
      const kind = isGiven ? "" : frame.masked[i][k] ? "mask" : "new";
      const shown = kind === "mask" ? "·" : piece; // shades show behind it
      const shade = entropy === null || isGiven ? 0 : Math.round(11 * Math.min(1, entropy / model.most_entropy)) / 20;
      if (last !== null && last.kind === kind && last.shade === shade) {
        last.text += shown;
      } else {
        last = { kind, shade, text: shown };
        spans.push(last);
      }
    });
    texts.children[i].replaceChildren(
      ...spans.map(({ kind, shade, text }) => {
        const span = document.createElement("span");
        span.className = kind;
        if (shade > 0) span.style.backgroundColor = `rgba(var(--warm), ${shade})`;
        span.textContent = text;
        return span;
      }),
    );
  });
}

// ---- the image to paint on ----

// Whether the results can be painted on: not while they have MASK.
function allowPainting(isAllowed) {
  for (const button of texts.querySelectorAll("button")) button.disabled = !isAllowed;
}

function startPainting(name, values, ranges) {
  painter.show(name, values, ranges);
  painter.box.scrollIntoView({ block: "nearest" });
}

// Asks for the values of an image, and shows it.
async function showImage(name, ranges) {
  try {
    const body = JSON.stringify({ image: name });
    if (body.length > model.most_bytes) throw new Error(`The file is too large: at most ${model.most_bytes} bytes in base64.`);
    const response = await fetch("v1/images", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error.message);
    startPainting(typeof name === "string" && name.startsWith("valid:") ? name : answer.image, answer.image, ranges);
    say(answer.label === null ? "" : `Class ${answer.label}`);
    return true;
  } catch (error) {
    say(error instanceof TypeError ? UNREACHABLE : error.message, true);
    return false;
  }
}

showValid.addEventListener("click", () => showImage(`valid:${valid.value}`));
file.addEventListener("change", () => {
  if (file.files.length === 0) return;
  const reader = new FileReader();
  reader.onload = () => showImage(reader.result);
  reader.onerror = () => say("The file cannot be read.", true);
  reader.readAsDataURL(file.files[0]);
  file.value = ""; // the same file can be chosen again
});

// ---- a request ----

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function write() {
  running?.abort();
  const own = new AbortController();
  running = own;
  const body = readForm();
  stop.disabled = false;
  run.disabled = true;
  allowPainting(false);
  progress.value = 0;
  legend.hidden = !body.entropy || !model.entropy;
  say("Starting …");
  let last = null;
  let pending = false;
  const draw = () => {
    pending = false;
    if (last !== null && running === own) showFrame(last);
  };
  try {
    const response = await fetch("v1/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...body, stream: true }),
      signal: own.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.object === "text_completion.queued") {
        say(`Waiting: ${event.ahead} before this one.`);
      } else if (event.object === "text_completion.step") {
        body.seed = event.seed;
        progress.max = event.steps;
        progress.value = event.step;
        say(`Step ${event.step} of ${event.steps}, seed ${event.seed}`);
        last = event;
        if (!pending) {
          pending = true;
          requestAnimationFrame(draw);
        }
      } else {
        draw();
        allowPainting(true);
        progress.value = progress.max;
        const address = permalink({ ...body, seed: event.seed });
        const isShort = address.length <= LONGEST_LINK;
        history.replaceState(null, "", isShort ? address : location.pathname);
        link.disabled = !isShort;
        say(`Done, seed ${event.seed}.${isShort ? "" : " There is no link: the request is too long for one."}`);
      }
    }
  } catch (error) {
    if (own.signal.aborted) say("Stopped.");
    else say(error instanceof TypeError ? UNREACHABLE : error.message, true);
  } finally {
    if (running === own) {
      running = null;
      stop.disabled = true;
      run.disabled = false;
    }
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  write();
});

async function start() {
  try {
    model = (await (await fetch("v1/models")).json()).data[0];
  } catch {
    say(UNREACHABLE, true);
    return;
  }
  document.title = `${model.id} · sedd play`;
  document.getElementById("name").textContent = model.id;
  document.getElementById("most").textContent = `${model.most_entropy} nats`;
  document.getElementById("facts").textContent = `${model.facts}.`;
  form.sampler.replaceChildren(...Object.keys(model.samplers).map((name) => new Option(name, name)));
  form.entropy.checked = form.entropy.checked && model.entropy;
  form.entropy.disabled = !model.entropy;
  document.getElementById("text-fields").hidden = model.shape.length > 0;
  imageFields.hidden = model.shape.length === 0;
  if (model.shape.length > 0) {
    painter = new Painter(model);
    texts.className = "images";
    run.textContent = "Sample";
  }
  for (const id of ["label-field", "guidance-field"]) document.getElementById(id).hidden = model.classes === 0;
  if (model.classes > 0) form.label.max = model.classes - 1;
  prompt_.value = `{{${Math.min(model.length, 64)}}}`;
  const query = new URLSearchParams(location.search);
  fillForm(query);
  if (painter !== null && query.has("image")) {
    const image = query.get("image");
    const ranges = [readLink(query, "mask", [])].flat().filter(Array.isArray);
    if (!(await showImage(image.startsWith("[") ? readLink(query, "image", "") : image, ranges))) return;
  }
  if (query.has("seed")) write();
}

start();
