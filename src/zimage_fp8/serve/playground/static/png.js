// The settings that a PNG carries: our own JSON, else A1111's lines.

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const latin1 = new TextDecoder("latin1");
const utf8 = new TextDecoder("utf-8");

/** The settings inside `file`, or null when it is no PNG or says nothing. */
export async function readSettings(file) {
  const texts = await readTexts(new Uint8Array(await file.arrayBuffer()));
  if (texts.zimage_fp8) {
    try {
      return fromOurs(JSON.parse(texts.zimage_fp8));
    } catch {
      // damaged: the other text may still do
    }
  }
  return texts.parameters ? fromA1111(texts.parameters) : null;
}

/** Every text chunk by keyword. */
async function readTexts(bytes) {
  const texts = {};
  if (!SIGNATURE.every((byte, at) => bytes[at] === byte)) return texts;
  const view = new DataView(bytes.buffer);
  let at = SIGNATURE.length;
  while (at + 12 <= bytes.length) {
    const length = view.getUint32(at);
    const type = latin1.decode(bytes.subarray(at + 4, at + 8));
    const data = bytes.subarray(at + 8, at + 8 + length);
    if (type === "tEXt" || type === "zTXt" || type === "iTXt") {
      const [keyword, text] = await readText(type, data).catch(() => [null]);
      if (keyword) texts[keyword] = text;
    }
    at += 12 + length;
  }
  return texts;
}

async function readText(type, data) {
  let [keyword, rest] = cut(data);
  keyword = latin1.decode(keyword);
  if (type === "tEXt") return [keyword, latin1.decode(rest)];
  if (type === "zTXt") return [keyword, latin1.decode(await inflate(rest.subarray(1)))];
  const isCompressed = rest[0] === 1;
  rest = cut(rest.subarray(2))[1]; // language
  rest = cut(rest)[1]; // translated keyword
  return [keyword, utf8.decode(isCompressed ? await inflate(rest) : rest)];
}

/** Before and after the first zero byte. */
function cut(bytes) {
  const zero = bytes.indexOf(0);
  if (zero < 0) throw new RangeError("a text chunk without its end");
  return [bytes.subarray(0, zero), bytes.subarray(zero + 1)];
}

async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function fromOurs({ prompt, negative_prompt, width, height, steps, guidance, seed, policy }) {
  return clean({ prompt, negative: negative_prompt, width, height, steps, guidance, seed, policy });
}

/** A1111: the prompt, perhaps a negative one, and a last line of `Key: value` pairs. */
function fromA1111(text) {
  const lines = text.trim().split("\n");
  const last = /(^|, )Steps: \d+/.test(lines.at(-1)) ? lines.pop() : "";
  const fields = Object.fromEntries(
    [...last.matchAll(/([A-Z][\w ]*): ("(?:[^"\\]|\\.)*"|[^,]*)/g)].map(([, k, v]) => [k, v]),
  );
  const mark = "Negative prompt: ";
  const at = lines.findIndex((line) => line.startsWith(mark));
  const negative = at < 0 ? "" : lines.splice(at).join("\n").slice(mark.length);
  const [width, height] = (fields.Size ?? "").split("x").map(Number);
  const cfg = Number(fields["CFG scale"]);
  return clean({
    prompt: lines.join("\n"),
    negative,
    width,
    height,
    steps: Number(fields.Steps),
    guidance: cfg >= 1 ? cfg - 1 : 0, // a classic scale of 1 is off
    seed: fields.Seed === undefined ? undefined : Number(fields.Seed),
  });
}

/** Only what has the right kind; the rest keeps its present value in the form. */
function clean(found) {
  const settings = {};
  for (const field of ["prompt", "negative", "policy"]) {
    if (typeof found[field] === "string") settings[field] = found[field];
  }
  for (const field of ["width", "height", "steps", "guidance", "seed"]) {
    if (Number.isFinite(found[field]) && found[field] >= 0) settings[field] = found[field];
  }
  return settings;
}
