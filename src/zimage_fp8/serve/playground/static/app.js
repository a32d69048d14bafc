// The page: what happens when something is pressed, typed or dropped.

import { ApiError, draw, listModels } from "./api.js";
import { Gallery } from "./gallery.js";
import { History } from "./history.js";
import { readSettings } from "./png.js";
import { $, SettingsForm } from "./settings.js";
import { asCurl, asPython } from "./snippets.js";
import { Stage } from "./stage.js";

const KEY = "zimage-fp8.key";
const PHONE = matchMedia("(max-width: 53.99rem)");

const form = new SettingsForm();
const stage = new Stage();
const history = await History.open();
const gallery = new Gallery(history, choose);
let running = null; // the AbortController of what is being drawn

// Drawing

async function start() {
  if (running) return;
  forgive();
  const first = form.read();
  if (!first.prompt) return fail(new ApiError("Describe a picture first.", { param: "prompt" }));
  const second = form.readSecond(first);
  if (second && same(first, second)) {
    return fail(new ApiError("Both pictures would be the same: change the policy, steps or seed."));
  }
  running = new AbortController();
  busy(true);
  const done = [];
  try {
    for (const settings of second ? [first, second] : [first]) {
      done.push(await drawOne(settings, done[0], second ? 2 : 1));
    }
    say(done.length > 1 ? "Both pictures are finished." : "The picture is finished.");
  } catch (error) {
    if (error.name === "AbortError") say("Cancelled.");
    else fail(error);
  } finally {
    running = null;
    busy(false);
  }
  show(done.length ? done : history.entries.slice(-1));
}

async function drawOne(settings, beside, count) {
  const began = performance.now();
  const before = beside ? 1 : 0;
  const which = count > 1 ? `${beside ? "Second" : "First"} picture: ` : "";
  let at = "Waiting for the engine";
  stage.begin(settings, beside);
  revealStage();
  say(`${which}drawing.`);
  const tick = () =>
    stage.tell(`${which}${at} · ${((performance.now() - began) / 1000).toFixed(1)} s`);
  const clock = setInterval(tick, 100);
  try {
    const answer = await draw(settings, {
      key: $("key").value,
      signal: running.signal,
      on: {
        step(step, steps) {
          at = `Step ${Math.min(step + 1, steps)} of ${steps}`;
          stage.progress((before + step / steps) / count);
          if (step === Math.ceil(steps / 2)) say(`${which}half done.`);
          tick();
        },
        preview: (blob) => stage.preview(blob),
      },
    });
    const entry = { created: Date.now(), settings: { ...settings, seed: answer.seed }, ...answer };
    await history.add(entry);
    gallery.refresh([entry]);
    return entry;
  } finally {
    clearInterval(clock);
  }
}

function same(a, b) {
  return ["model", "steps", "seed"].every((field) => a[field] === b[field]);
}

function busy(isBusy) {
  const hadFocus = document.activeElement === $(isBusy ? "draw" : "cancel");
  $("draw").hidden = isBusy;
  $("cancel").hidden = !isBusy;
  $("frame").ariaBusy = String(isBusy);
  if (hadFocus) $(isBusy ? "cancel" : "draw").focus();
}

// Showing

function show(entries) {
  stopPicking();
  if (!entries.length) stage.clear();
  else if (entries.length === 1) stage.show(entries[0]);
  else stage.compare(...entries);
  const [entry] = entries;
  if (entry) {
    URL.revokeObjectURL($("save").href);
    $("save").href = URL.createObjectURL(entry.blob);
    $("save").download = `${fileName(entry.settings)}.png`;
  }
  for (const id of ["save", "delete", "start-here"]) $(id).hidden = entries.length > 1;
  $("compare").hidden = history.entries.length < 2;
  gallery.refresh(entries);
}

function fileName({ prompt, seed }) {
  const words = prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? ["picture"];
  return [...words.join("-").slice(0, 60).split("-"), seed].join("-");
}

function choose(entry) {
  if (running) return;
  const isPicking = $("compare").getAttribute("aria-pressed") === "true";
  const [shown] = stage.shown;
  show(isPicking && shown && shown !== entry ? [shown, entry] : [entry]);
  if (isPicking) $("divider").focus();
  revealStage();
}

function stopPicking() {
  $("compare").setAttribute("aria-pressed", "false");
  document.body.classList.remove("is-picking");
}

/** On a phone the picture may lie below the fold. */
function revealStage() {
  if (!PHONE.matches) return;
  const behavior = matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth";
  $("frame").scrollIntoView({ block: "nearest", behavior });
}

// Saying

function say(text) {
  $("status").textContent = text;
}

function fail(error) {
  const text = error instanceof ApiError ? error.message : `The page failed: ${error.message}`;
  $("error").textContent = text;
  $("error").hidden = false;
  if (error.status === 401) askForKey(true);
  else if (!form.blame(error.param)) $("error").focus();
}

function forgive() {
  form.absolve();
  $("error").hidden = true;
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function askForKey(takeFocus) {
  $("access").hidden = false;
  if (takeFocus) $("key").focus();
}

async function greet() {
  try {
    const models = await listModels($("key").value);
    form.setModels(models);
    const names = models.map(({ id }) => id);
    $("serving").textContent = names.length > 2 ? `${names.length} policies` : names.join(", ");
    forgive();
  } catch (error) {
    if (error.status === 401 && !$("key").value) askForKey(false);
    else fail(error);
  }
}

// Files

/** A PNG with settings inside gives those; any other picture is one to start from. */
async function take(file, wantStart) {
  if (!file || running) return;
  forgive();
  const settings = wantStart ? null : await readSettings(file);
  if (settings) {
    const missing = form.fill(settings);
    const lost = missing ? ` Its policy ${missing} is not served here.` : "";
    notice(`Settings taken from ${file.name}.${lost}`);
  } else if (file.type.startsWith("image/")) {
    form.setStart(file);
    notice(`${file.name} ${wantStart ? "is" : "carries no settings: it becomes"} the start.`);
  } else {
    fail(new ApiError(`${file.name} is no picture.`));
  }
}

let wantStart = false;

function pick(forStart) {
  wantStart = forStart;
  $("file").value = "";
  $("file").click();
}

// Wiring

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});
$("cancel").addEventListener("click", () => running?.abort());
$("form").addEventListener("input", () => notice(""));
addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    start();
  } else if (event.key === "Escape") {
    running?.abort();
    stopPicking();
  }
});

$("key").value = sessionStorage.getItem(KEY) ?? "";
$("key").addEventListener("change", () => {
  sessionStorage.setItem(KEY, $("key").value);
  greet();
});

$("facts").addEventListener("click", ({ target }) => {
  if (!target.dataset.seed) return;
  form.fill({ seed: target.dataset.seed });
  notice(`Seed ${target.dataset.seed} is kept for the next picture.`);
});
$("reuse").addEventListener("click", () => {
  form.fill(stage.shown[0].settings);
  notice("Settings taken from this picture.");
  $("prompt").focus();
});
$("start-here").addEventListener("click", () => {
  form.setStart(stage.shown[0].blob);
  notice("The next picture starts from this one.");
  $("more").open = true;
  $("strength").focus();
});
$("compare").addEventListener("click", () => {
  const isOn = $("compare").getAttribute("aria-pressed") !== "true";
  $("compare").setAttribute("aria-pressed", String(isOn));
  document.body.classList.toggle("is-picking", isOn);
  say(isOn ? "Choose another picture from the history." : "");
  if (isOn) $("history").scrollIntoView({ block: "nearest" });
});
$("delete").addEventListener("click", async () => {
  const at = history.entries.indexOf(stage.shown[0]);
  await history.remove(stage.shown[0]);
  show(history.entries.slice(Math.max(0, at - 1)).slice(0, 1));
  say("Deleted.");
});

$("clear").addEventListener("click", () => $("clear-dialog").showModal());
$("clear-no").addEventListener("click", () => $("clear-dialog").close());
$("clear-yes").addEventListener("click", async () => {
  await history.clear();
  $("clear-dialog").close();
  show([]);
  $("prompt").focus();
});

function writeSnippet() {
  const language = document.querySelector("[name=language]:checked").value;
  const write = language === "curl" ? asCurl : asPython;
  $("snippet").textContent = write(stage.shown[0].settings, Boolean($("key").value));
  $("copy").textContent = "Copy";
}
$("code").addEventListener("click", () => {
  writeSnippet();
  $("code-dialog").showModal();
});
for (const choice of document.getElementsByName("language")) {
  choice.addEventListener("change", writeSnippet);
}
$("close-code").addEventListener("click", () => $("code-dialog").close());
$("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("snippet").textContent);
    $("copy").textContent = "Copied";
  } catch {
    // The clipboard is closed to pages without HTTPS: select the text for Ctrl+C instead.
    getSelection().selectAllChildren($("snippet"));
    $("copy").textContent = "Selected: press Ctrl+C";
  }
});

$("open-picture").addEventListener("click", () => pick(false));
$("choose-start").addEventListener("click", () => pick(true));
$("file").addEventListener("change", () => take($("file").files[0], wantStart));
const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
addEventListener("dragover", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  $("drop").hidden = false;
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("drop").hidden = true;
});
addEventListener("drop", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  $("drop").hidden = true;
  take(event.dataTransfer.files[0], $("start-field").contains(event.target));
});

if (PHONE.matches) $("more").open = false;
if (/Mac|iP/.test(navigator.platform)) $("draw").querySelector("kbd").textContent = "⌘ ⏎";
show(history.entries.slice(-1));
await greet();
document.documentElement.dataset.ready = "true";
