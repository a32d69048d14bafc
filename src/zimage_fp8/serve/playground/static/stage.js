// The easel: a picture being drawn, one finished picture, or two under a divider.

import { $ } from "./settings.js";

const AMPLIFY = 8; // differences of 8-bit policies are too faint to see as they are

/** Pictures are entries of the history: { settings, facts, warnings, blob }. */
export class Stage {
  shown = [];
  #urls = new Map(); // layer -> object URL

  constructor() {
    $("divider").addEventListener("input", () => this.#divide($("divider").value));
    for (const choice of document.getElementsByName("view")) {
      choice.addEventListener("change", () => this.#view(choice.value));
    }
  }

  clear() {
    this.#reset([]);
    $("frame").className = "frame is-empty";
    $("empty").hidden = false;
    $("label").hidden = true;
    this.#shape({ width: 1, height: 1 });
  }

  /** Make room for the picture of `settings`; `beside` is the finished one it is compared with. */
  begin(settings, beside) {
    this.#reset(beside ? [beside] : []);
    this.latest = beside ? $("other") : $("first");
    this.#shape(settings);
    $("frame").classList.toggle("is-waiting", !beside);
    if (beside) this.#put($("first"), beside.blob, beside.settings.prompt);
    $("progress").hidden = false;
    $("progress").removeAttribute("value");
    $("actions").hidden = true;
    this.#describe(settings);
    this.tell("Waiting for the engine");
  }

  /** `share` of all there is to do, 0 to 1. */
  progress(share) {
    $("progress").value = share;
  }

  tell(text) {
    $("facts").textContent = text;
  }

  preview(blob) {
    $("frame").classList.remove("is-waiting");
    this.#put(this.latest, blob, "Preview");
    if (this.latest === $("other")) this.#pair();
  }

  show(entry) {
    this.#reset([entry]);
    this.#shape(entry.settings);
    this.#put($("first"), entry.blob, entry.settings.prompt);
    this.#describe(entry.settings);
    $("facts").replaceChildren(...facts(entry));
    this.#warn(entry.warnings);
    $("actions").hidden = false;
  }

  async compare(a, b) {
    this.#reset([a, b]);
    this.#shape(a.settings);
    this.#put($("first"), a.blob, a.settings.prompt);
    this.#put($("other"), b.blob, b.settings.prompt);
    this.#describe(a.settings);
    this.#warn([...new Set([...a.warnings, ...b.warnings])]);
    const [left, right] = differences(a.settings, b.settings);
    this.#tag($("tag-first"), left);
    this.#tag($("tag-other"), right);
    $("divider").setAttribute("aria-valuetext", `between ${left} and ${right}`);
    $("views").hidden = false;
    $("actions").hidden = false;
    this.#pair();
    this.#view(document.querySelector("[name=view]:checked").value);
    this.tell(`${left} vs ${right}`);
    const psnr = await this.#measure(a, b);
    if (this.shown[0] === a && this.shown[1] === b) {
      this.tell([`${left} vs ${right}`, psnr].filter(Boolean).join(" · "));
    }
  }

  #reset(entries) {
    this.shown = entries;
    $("frame").className = "frame";
    $("frame").dataset.view = "slider";
    $("label").hidden = false;
    const parts = ["empty", "first", "other", "difference", "tag-first", "tag-other"];
    for (const id of [...parts, "divider", "handle", "progress", "views", "warnings"]) {
      $(id).hidden = true;
    }
    for (const [layer, url] of this.#urls) {
      layer.removeAttribute("src");
      URL.revokeObjectURL(url);
    }
    this.#urls.clear();
  }

  #put(layer, blob, alt) {
    const url = URL.createObjectURL(blob);
    URL.revokeObjectURL(this.#urls.get(layer));
    this.#urls.set(layer, url);
    layer.src = url;
    layer.alt = alt;
    layer.hidden = false;
  }

  #pair() {
    $("divider").hidden = $("handle").hidden = false;
    this.#divide($("divider").value);
  }

  #divide(percent) {
    $("frame").style.setProperty("--at", `${percent}%`);
  }

  #view(name) {
    $("frame").dataset.view = name;
    const isSlider = name === "slider";
    $("divider").hidden = $("handle").hidden = !isSlider;
    $("difference").hidden = name !== "difference";
    for (const id of ["tag-first", "tag-other"]) $(id).hidden = name === "difference";
    const { width, height } = this.shown[0].settings;
    this.#shape({ width: name === "sides" ? 2 * width : width, height });
  }

  #shape({ width, height }) {
    $("frame").style.setProperty("--x", width);
    $("frame").style.setProperty("--y", height);
  }

  #tag(tag, text) {
    tag.textContent = text;
    tag.hidden = false;
  }

  #describe({ prompt }) {
    $("caption").textContent = prompt;
  }

  #warn(warnings) {
    $("warnings").hidden = warnings.length === 0;
    $("warnings").replaceChildren(
      ...warnings.map((text) => Object.assign(document.createElement("li"), { textContent: text })),
    );
  }

  /** Paints the amplified difference; returns the PSNR in words, nothing when sizes differ. */
  async #measure(a, b) {
    const [left, right] = await Promise.all([pixels(a.blob), pixels(b.blob)]);
    const canvas = $("difference");
    const isSame = left.width === right.width && left.height === right.height;
    document.querySelector("[value=difference]").disabled = !isSame;
    if (!isSame) return null;
    canvas.width = left.width;
    canvas.height = left.height;
    const { image, error } = subtract(left, right);
    canvas.getContext("2d").putImageData(image, 0, 0);
    return error ? `PSNR ${(10 * Math.log10(255 ** 2 / error)).toFixed(1)} dB` : "identical pixels";
  }
}

/** |left − right|, amplified, and the mean squared error over red, green and blue. */
function subtract(left, right) {
  const image = new ImageData(left.width, left.height);
  let sum = 0;
  for (let at = 0; at < image.data.length; at++) {
    if (at % 4 === 3) {
      image.data[at] = 255;
      continue;
    }
    const gap = left.data[at] - right.data[at];
    sum += gap * gap;
    image.data[at] = Math.min(255, AMPLIFY * Math.abs(gap));
  }
  return { image, error: sum / (0.75 * image.data.length) };
}

async function pixels(blob) {
  const bitmap = await createImageBitmap(blob);
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

const SHOWN = {
  model: (value) => value,
  steps: (value) => `${value} step${value === 1 ? "" : "s"}`,
  seed: (value) => `seed ${value}`,
  guidance: (value) => `guidance ${value}`,
  strength: (value) => `strength ${value}`,
};

/** What tells two pictures apart, once for each. */
export function differences(a, b) {
  const fields = Object.keys(SHOWN).filter((field) => a[field] !== b[field]);
  const say = (settings) =>
    fields
      .filter((field) => settings[field] !== undefined)
      .map((field) => SHOWN[field](settings[field]))
      .join(" · ");
  return [say(a) || "first", say(b) || "second"];
}

function* facts({ settings, facts }) {
  const { width, height, seed, steps, guidance, model } = settings;
  const keep = Object.assign(document.createElement("button"), {
    type: "button",
    textContent: `seed ${seed}`,
    title: "Keep this seed",
  });
  keep.dataset.seed = seed;
  yield keep;
  const rest = [`${width} × ${height}`, SHOWN.steps(steps)];
  if (guidance > 0) rest.push(SHOWN.guidance(guidance));
  if (settings.start) rest.push(SHOWN.strength(settings.strength));
  rest.push(facts?.policy ?? model);
  const seconds = spent(facts?.timings_s);
  if (seconds) rest.push(`${seconds.toFixed(seconds < 10 ? 2 : 1)} s`);
  yield ` · ${rest.join(" · ")}`;
}

/** Seconds that the picture itself took: no waiting, no previews. */
function spent(timings = {}) {
  const { queue, preview, ...stages } = timings;
  return Object.values(stages).reduce((sum, seconds) => sum + seconds, 0);
}
