// The page of sedd play: sends the form to /v1/completions and shows the events of the answer.
"use strict";

const form = document.getElementById("form");
const [prompt_, gap, gapSize, run, stop, link, progress, status_, texts, params, legend] = [
  "prompt", "gap", "gap-size", "run", "stop", "link", "progress", "status", "texts", "params", "legend",
].map((id) => document.getElementById(id));
const NUMBERS = ["steps", "temperature", "top_p", "n", "seed"];
let model = null;
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
  const body = { prompt: prompt_.value, sampler: form.sampler.value, entropy: form.entropy.checked };
  for (const name of NUMBERS) if (form[name].value !== "") body[name] = Number(form[name].value);
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
  let given = {};
  try {
    given = JSON.parse(query.get("sampler_params") ?? "{}") ?? {};
  } catch {
    say("The link has sampler parameters that cannot be read.", true);
  }
  showParameters(given);
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

function showFrame(frame) {
  while (texts.children.length > frame.pieces.length) texts.lastChild.remove();
  while (texts.children.length < frame.pieces.length) {
    const text = document.createElement("p");
    text.className = "text";
    texts.append(text);
  }
  frame.pieces.forEach((pieces, i) => {
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
        progress.value = progress.max;
        say(`Done, seed ${event.seed}.`);
        history.replaceState(null, "", permalink({ ...body, seed: event.seed }));
        link.disabled = false;
      }
    }
  } catch (error) {
    if (own.signal.aborted) say("Stopped.");
    else say(error instanceof TypeError ? "The server does not answer. Is sedd play still running?" : error.message, true);
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
    say("The server does not answer. Is sedd play still running?", true);
    return;
  }
  document.title = `${model.id} · sedd play`;
  document.getElementById("name").textContent = model.id;
  document.getElementById("most").textContent = `${model.most_entropy} nats`;
  document.getElementById("facts").textContent = `${model.facts}.`;
  form.sampler.replaceChildren(...Object.keys(model.samplers).map((name) => new Option(name, name)));
  form.entropy.checked = form.entropy.checked && model.entropy;
  form.entropy.disabled = !model.entropy;
  prompt_.value = `{{${Math.min(model.length, 64)}}}`;
  const query = new URLSearchParams(location.search);
  fillForm(query);
  if (query.has("prompt")) write();
}

start();
