// Pictures kept in this browser (IndexedDB), up to a size; the oldest go first.

export const MAX_BYTES = 256 * 2 ** 20;
const THUMB_SIDE = 224;

/** Entries are { id, created, settings, facts, warnings, blob, thumb }; the database gives the id,
 * so that two tabs never write over each other's pictures.
 *
 * Where the browser keeps nothing (a private window, no room), they live as long as the page.
 */
export class History {
  static async open() {
    let database = null;
    try {
      const request = indexedDB.open("zimage-fp8", 1);
      request.onupgradeneeded = () => {
        request.result.createObjectStore("pictures", { keyPath: "id", autoIncrement: true });
      };
      database = await done(request);
    } catch {
      // told by `isKept`
    }
    const history = new History(database);
    if (database) history.entries = await done(history.#store("readonly").getAll());
    return history;
  }

  constructor(database) {
    this.database = database;
    this.entries = [];
  }

  get isKept() {
    return this.database !== null;
  }

  get bytes() {
    const size = ({ blob, thumb, settings: { start } }) =>
      blob.size + thumb.size + (start?.size ?? 0);
    return this.entries.reduce((sum, entry) => sum + size(entry), 0);
  }

  /** Keep `entry`, and let go of the oldest beyond the limit. */
  async add(entry) {
    entry.thumb = await thumbnail(entry.blob);
    this.entries.push(entry);
    const gone = [];
    while (this.bytes > MAX_BYTES && this.entries.length > 1) gone.push(this.entries.shift());
    await this.#write((store) => {
      store.add(entry).onsuccess = ({ target }) => (entry.id = target.result);
      for (const { id } of gone) if (id !== undefined) store.delete(id);
    });
  }

  async remove(entry) {
    this.entries = this.entries.filter((other) => other !== entry);
    await this.#write((store) => entry.id !== undefined && store.delete(entry.id));
  }

  async clear() {
    this.entries = [];
    await this.#write((store) => store.clear());
  }

  #store(mode) {
    return this.database.transaction("pictures", mode).objectStore("pictures");
  }

  async #write(change) {
    if (!this.database) return;
    try {
      const store = this.#store("readwrite");
      change(store);
      await new Promise((resolve, reject) => {
        store.transaction.oncomplete = resolve;
        store.transaction.onabort = () => reject(store.transaction.error);
      });
    } catch {
      this.database = null; // no room: from now on in memory only
    }
  }
}

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("another tab holds an older history"));
  });
}

async function thumbnail(blob) {
  const bitmap = await createImageBitmap(blob);
  const shrink = Math.min(1, THUMB_SIDE / Math.min(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(bitmap.width * shrink);
  canvas.height = Math.round(bitmap.height * shrink);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return new Promise((resolve) => canvas.toBlob(resolve, "image/webp", 0.85));
}
