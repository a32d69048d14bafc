// The form on one side, a plain `settings` object on the other:
// { prompt, negative, width, height, steps, guidance, seed, model, policy, start, strength }

export const $ = (id) => document.getElementById(id);

const DRAFT = "zimage-fp8.settings";
const DEFAULTS = { steps: 8, guidance: 0, strength: 0.6, side: 1024 };
const SHAPES = [[1, 1], [3, 2], [2, 3], [16, 9], [9, 16], [2, 1]];
const SEEDS = 2 ** 32;

// The API's names of the fields, so that an error can be shown where it belongs.
const FIELD_OF = {
  prompt: "prompt",
  negative_prompt: "negative",
  size: "width",
  num_inference_steps: "steps",
  guidance_scale: "guidance",
  seed: "seed",
  model: "model",
  strength: "strength",
  image: "choose-start",
};

export class SettingsForm {
  models = [];
  start = null;

  constructor() {
    for (const id of ["steps", "guidance", "strength"]) this.#link(id);
    $("form").addEventListener("input", () => this.#refresh());
    $("swap").addEventListener("click", () => {
      [$("width").value, $("height").value] = [$("height").value, $("width").value];
      this.#refresh();
    });
    $("forget-seed").addEventListener("click", () => {
      $("seed").value = "";
      this.#refresh();
      $("seed").focus();
    });
    $("model").addEventListener("change", () => this.#drawShapes());
    $("two").addEventListener("change", () => this.#suggestSecond());
    $("remove-start").addEventListener("click", () => {
      this.setStart(null);
      $("choose-start").focus();
    });
    this.#restore();
  }

  setModels(models) {
    const chosen = $("model").value || this.wantedModel;
    this.models = models;
    for (const select of [$("model"), $("second-model")]) {
      select.replaceChildren(...models.map(({ id }) => new Option(id, id)));
    }
    if (models.some(({ id }) => id === chosen)) $("model").value = chosen;
    const several = models.length > 1;
    $("model-field").hidden = $("second-model-field").hidden = !several;
    this.#drawShapes();
    if (!$("width").value) this.#setSize(...this.#defaultSize());
    this.#suggestSecond();
  }

  /** What to draw; an empty seed becomes a random one, other empty fields their usual value. */
  read() {
    const [width, height] = this.#defaultSize();
    const model = this.#model();
    const settings = {
      prompt: $("prompt").value.trim(),
      negative: $("negative").value.trim(),
      width: number("width", width),
      height: number("height", height),
      steps: number("steps", DEFAULTS.steps),
      guidance: number("guidance", DEFAULTS.guidance),
      seed: number("seed", Math.floor(Math.random() * SEEDS)),
      model: model?.id,
      policy: model?.policy,
    };
    return this.start
      ? { ...settings, start: this.start, strength: number("strength", DEFAULTS.strength) }
      : settings;
  }

  /** The second picture to compare `first` with, or null when only one is wanted. */
  readSecond(first) {
    if (!$("two").checked) return null;
    const model = this.models.find(({ id }) => id === $("second-model").value);
    return {
      ...first,
      steps: number("second-steps", first.steps),
      seed: number("second-seed", first.seed),
      model: model?.id ?? first.model,
      policy: model?.policy ?? first.policy,
    };
  }

  /** Take over what `settings` has. Returns the policy that it names and that is not served. */
  fill(settings) {
    for (const id of ["prompt", "negative", "steps", "guidance", "seed", "strength"]) {
      if (settings[id] !== undefined) $(id).value = settings[id];
    }
    if (settings.width && settings.height) this.#setSize(settings.width, settings.height);
    const model =
      this.models.find(({ id }) => id === settings.model) ??
      this.models.find(({ policy }) => policy === settings.policy);
    if (model) $("model").value = model.id;
    if ("start" in settings || settings.prompt !== undefined) this.setStart(settings.start ?? null);
    for (const id of ["steps", "guidance", "strength"]) $(`${id}-range`).value = $(id).value;
    this.#refresh();
    return model || !settings.policy ? null : settings.policy;
  }

  setStart(blob) {
    this.start = blob;
    URL.revokeObjectURL($("start-image").src);
    if (blob) $("start-image").src = URL.createObjectURL(blob);
    $("start-empty").hidden = Boolean(blob);
    $("start-chosen").hidden = !blob;
    this.#refresh();
  }

  /** Mark the field that an error names, and bring the cursor there. Returns whether it exists. */
  blame(param) {
    const field = $(FIELD_OF[param]);
    if (!field) return false;
    field.setAttribute("aria-invalid", "true");
    field.setAttribute("aria-errormessage", "error");
    if ($("more").contains(field)) $("more").open = true;
    field.focus();
    return true;
  }

  absolve() {
    for (const field of document.querySelectorAll("[aria-invalid]")) {
      field.removeAttribute("aria-invalid");
      field.removeAttribute("aria-errormessage");
    }
  }

  #model() {
    return this.models.find(({ id }) => id === $("model").value) ?? this.models[0];
  }

  #defaultSize() {
    const size = this.#model()?.default_size ?? `${DEFAULTS.side}x${DEFAULTS.side}`;
    return size.split("x").map(Number);
  }

  #setSize(width, height) {
    $("width").value = width;
    $("height").value = height;
    this.#refresh();
  }

  /** A slider for fingers beside a number for everything else; only the number is a tab stop. */
  #link(id) {
    const [box, range] = [$(id), $(`${id}-range`)];
    box.value = range.value = DEFAULTS[id];
    box.addEventListener("input", () => (range.value = box.value));
    range.addEventListener("input", () => (box.value = range.value));
  }

  /** Shapes with about as many pixels as the model's own size, in multiples of 16. */
  #drawShapes() {
    const [width, height] = this.#defaultSize();
    const side = Math.sqrt(width * height);
    const round = (length) => Math.max(16, Math.round(length / 16) * 16);
    $("shapes").replaceChildren(
      ...SHAPES.map(([x, y]) => {
        const size = [round(side * Math.sqrt(x / y)), round(side * Math.sqrt(y / x))];
        const input = Object.assign(document.createElement("input"), {
          type: "radio",
          name: "shape",
          value: size.join("x"),
        });
        input.addEventListener("change", () => this.#setSize(...size));
        const text = document.createElement("span");
        text.textContent = `${x}:${y}`;
        const longer = Math.max(x, y);
        text.style.setProperty("--x", x / longer);
        text.style.setProperty("--y", y / longer);
        const label = document.createElement("label");
        label.title = size.join(" × ");
        label.append(input, text);
        return label;
      }),
    );
    this.#refresh();
  }

  /** One thing differs to begin with: the policy where there are several, else the steps. */
  #suggestSecond() {
    $("second").hidden = !$("two").checked;
    const others = this.models.filter(({ id }) => id !== this.#model()?.id);
    if (others.length) {
      if ($("second-model").value === $("model").value) $("second-model").value = others[0].id;
    } else if (!$("second-steps").value && !$("second-seed").value) {
      $("second-steps").value = Math.max(1, Math.round(number("steps", DEFAULTS.steps) / 2));
    }
    $("second-steps").placeholder = "the same";
    this.#refresh();
  }

  #refresh() {
    const size = `${$("width").value}x${$("height").value}`;
    for (const shape of $("shapes").querySelectorAll("input")) shape.checked = shape.value === size;
    $("negative-field").hidden = !(number("guidance", 0) > 0);
    $("forget-seed").hidden = !$("seed").value;
    $("model-hint").textContent = describe(this.#model());
    $("summary").textContent = [
      size.replace("x", " × "),
      `${number("steps", DEFAULTS.steps)} steps`,
      $("seed").value ? `seed ${$("seed").value}` : "new seed",
      ...(this.models.length > 1 ? [$("model").value] : []),
    ].join(" · ");
    $("draw").firstChild.data = $("two").checked ? "Draw two " : "Draw ";
    this.#save();
  }

  #save() {
    const { start, policy, ...draft } = this.read();
    draft.seed = $("seed").value || undefined;
    try {
      localStorage.setItem(DRAFT, JSON.stringify(draft));
    } catch {
      // a private window keeps nothing
    }
  }

  #restore() {
    try {
      const draft = JSON.parse(localStorage.getItem(DRAFT)) ?? {};
      this.wantedModel = draft.model;
      this.fill(draft);
    } catch {
      // nothing kept, or kept by another version
    }
  }
}

function number(id, otherwise) {
  const value = $(id).valueAsNumber;
  return Number.isFinite(value) ? value : otherwise;
}

/** What /v1/models tells about one of them, beyond its name. */
function describe({ id, policy, weights_bytes: bytes, quality } = {}) {
  const size = bytes >= 1e9 ? `${(bytes / 1e9).toFixed(1)} GB` : `${Math.round(bytes / 1e6)} MB`;
  return [
    policy !== id && policy,
    bytes && `${size} of weights`,
    quality?.median_psnr_db && `${quality.median_psnr_db.toFixed(1)} dB from BF16`,
  ]
    .filter(Boolean)
    .join(" · ");
}
