// The image that is painted on: its values, and the pixels that are to be sampled again.
"use strict";

// Values as grey or coloured pixels. MASK is orange; with its entropy, it is the greyer the smaller that is.
function drawImage(canvas, model, values, masked, entropy) {
  const [height, width, channels] = model.shape;
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  for (let pixel = 0; pixel < height * width; pixel++) {
    for (let k = 0; k < 3; k++) {
      const at = pixel * channels + (channels === 3 ? k : 0);
      const share = entropy === null || entropy[at] === null ? 1 : Math.min(1, entropy[at] / model.most_entropy);
      image.data[4 * pixel + k] = masked[at] ? [128 + 96 * share, 128 - 6 * share, 128 - 128 * share][k] : values[at];
    }
    image.data[4 * pixel + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

class Painter {
  #painted = []; // whether each pixel is
  #last = null; // where the pointer was, in pixels of the image

  constructor(model) {
    [this.canvas, this.brush, this.erase, this.box] = ["paint", "brush", "erase", "painter"].map((id) =>
      document.getElementById(id),
    );
    this.model = model;
    this.name = null; // what a request calls the image
    this.values = [];
    this.brush.max = Math.max(2, Math.ceil(Math.max(model.shape[0], model.shape[1]) / 2));
    this.brush.value = Math.max(1, Math.round(model.shape[1] / 8));
    this.canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      event.preventDefault();
      this.canvas.setPointerCapture(event.pointerId);
      this.#last = this.#place(event);
      this.#stroke(event);
    });
    this.canvas.addEventListener("pointermove", (event) => this.#last && this.#stroke(event));
    // A quick stroke of a finger would scroll on after it ends, and the next tap would only stop that.
    this.canvas.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false });
    for (const end of ["pointerup", "pointercancel"]) this.canvas.addEventListener(end, () => (this.#last = null));
    document.getElementById("clear").addEventListener("click", () => this.#change(() => false));
    document.getElementById("invert").addEventListener("click", () => this.#change((is) => !is));
    document.getElementById("remove").addEventListener("click", () => this.show(null, []));
  }

  // Shows an image, on which nothing or the pixels in the ranges are painted; none if the name is null.
  show(name, values, ranges = []) {
    Object.assign(this, { name, values });
    this.box.hidden = name === null;
    this.#painted = Array(this.model.shape[0] * this.model.shape[1]).fill(false);
    for (const [first, end] of ranges) this.#painted.fill(true, first, end);
    if (name !== null) this.#draw();
  }

  // The painted pixels as ranges [first, end).
  ranges() {
    const found = [];
    this.#painted.forEach((is, pixel) => {
      if (!is) return;
      if (found.length > 0 && found.at(-1)[1] === pixel) found.at(-1)[1]++;
      else found.push([pixel, pixel + 1]);
    });
    return found;
  }

  #change(to) {
    this.#painted = this.#painted.map(to);
    this.#draw();
  }

  #draw() {
    const channels = this.model.shape[2];
    const masked = this.#painted.flatMap((is) => Array(channels).fill(is));
    drawImage(this.canvas, this.model, this.values, masked, null);
  }

  #place(event) {
    const [height, width] = this.model.shape;
    return [(event.offsetX / this.canvas.clientWidth) * width, (event.offsetY / this.canvas.clientHeight) * height];
  }

  // Paints from where the pointer was to where it is, with a round brush.
  #stroke(event) {
    const [x, y] = this.#last;
    const [toX, toY] = this.#place(event);
    const steps = Math.max(1, Math.ceil(2 * Math.hypot(toX - x, toY - y)));
    for (let i = 0; i <= steps; i++) this.#dab(x + ((toX - x) * i) / steps, y + ((toY - y) * i) / steps);
    this.#last = [toX, toY];
    this.#draw();
  }

  #dab(x, y) {
    const [height, width] = this.model.shape;
    const radius = Number(this.brush.value) / 2;
    for (let row = Math.max(0, Math.floor(y - radius)); row < Math.min(height, y + radius); row++) {
      for (let column = Math.max(0, Math.floor(x - radius)); column < Math.min(width, x + radius); column++) {
        const isUnder = row === Math.floor(y) && column === Math.floor(x);
        if (isUnder || Math.hypot(column + 0.5 - x, row + 0.5 - y) <= radius) {
          this.#painted[row * width + column] = !this.erase.checked;
        }
      }
    }
  }
}
