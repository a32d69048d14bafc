// The history as a list of thumbnails, newest first: one tab stop, arrows inside.

import { $ } from "./settings.js";
import { MAX_BYTES } from "./history.js";

const MOVES = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };

export class Gallery {
  #urls = new Map(); // entry -> object URL of its thumbnail

  /** `choose(entry)` is called when one is clicked. */
  constructor(history, choose) {
    this.history = history;
    this.choose = choose;
    $("pictures").addEventListener("keydown", (event) => this.#move(event));
  }

  /** Draw the list again; `shown` are the entries on the easel. */
  refresh(shown) {
    const { entries, bytes, isKept } = this.history;
    for (const [entry, url] of this.#urls) {
      if (entries.includes(entry)) continue;
      URL.revokeObjectURL(url);
      this.#urls.delete(entry);
    }
    $("history").hidden = entries.length === 0;
    const megabytes = Math.max(0.1, bytes / 2 ** 20).toFixed(1);
    $("kept").textContent = isKept
      ? `${entries.length} in this browser, ${megabytes} of ${MAX_BYTES / 2 ** 20} MB`
      : `${entries.length}, until this page is closed: the browser keeps nothing`;
    $("pictures").replaceChildren(...entries.toReversed().map((entry) => this.#item(entry, shown)));
    const current = $("pictures").querySelector("[aria-current=true]");
    (current ?? $("pictures").querySelector("button"))?.setAttribute("tabindex", "0");
  }

  #item(entry, shown) {
    if (!this.#urls.has(entry)) this.#urls.set(entry, URL.createObjectURL(entry.thumb));
    const { prompt, seed, model } = entry.settings;
    const image = Object.assign(document.createElement("img"), {
      src: this.#urls.get(entry),
      alt: `${prompt}, seed ${seed}, ${model}`,
      loading: "lazy",
      decoding: "async",
    });
    const button = Object.assign(document.createElement("button"), {
      type: "button",
      title: `${prompt}\nseed ${seed} · ${entry.settings.steps} steps · ${model}`,
      tabIndex: -1,
    });
    if (shown.includes(entry)) button.setAttribute("aria-current", "true");
    button.append(image);
    button.addEventListener("click", () => this.choose(entry));
    const item = document.createElement("li");
    item.append(button);
    return item;
  }

  #move(event) {
    const buttons = [...$("pictures").querySelectorAll("button")];
    const at = buttons.indexOf(document.activeElement);
    const ends = { Home: 0, End: buttons.length - 1 };
    const next = buttons[ends[event.key] ?? at + (MOVES[event.key] ?? NaN)];
    if (at < 0 || !next) return;
    event.preventDefault();
    buttons[at].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
}
