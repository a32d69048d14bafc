// The server's public API, as any other client would use it.

// Relative, so that the page also works below a prefix that a proxy adds.
export const endpoint = (path) => new URL(path, document.baseURI).href;

export class ApiError extends Error {
  constructor(message, { status = 0, code = null, param = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param });
  }
}

export async function listModels(key) {
  const response = await send(endpoint("v1/models"), { headers: authorization(key) });
  return (await response.json()).data;
}

/** Draw one picture.
 *
 * on.step(done, total) is told of every step, on.preview(blob) of the previews. Resolves to
 * { blob, seed, facts, warnings }. Rejects with ApiError, or AbortError when `signal` says so.
 */
export async function draw(settings, { key, signal, on }) {
  const request = settings.start ? await edit(settings) : generation(settings);
  const response = await send(request.url, {
    method: "POST",
    headers: { ...authorization(key), "content-type": "application/json" },
    body: request.body,
    signal,
  });
  for await (const { comment, data } of events(response)) {
    const step = comment?.match(/^step (\d+)\/(\d+)/);
    if (step) on.step(Number(step[1]), Number(step[2]));
    if (!data) continue;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(event.error.message, event.error);
    const blob = toBlob(event.b64_json, `image/${event.output_format}`);
    if (event.type.endsWith(".completed")) {
      return { blob, seed: event.seed, facts: event.zimage_fp8, warnings: event.warnings ?? [] };
    }
    on.preview(blob);
  }
  throw new ApiError("The answer ended before the picture was finished.");
}

/** What the API calls these settings; also what “Copy as code” shows. */
export function body(settings) {
  const { prompt, negative, width, height, steps, guidance, seed, model } = settings;
  return {
    model,
    prompt,
    size: `${width}x${height}`,
    seed,
    num_inference_steps: steps,
    guidance_scale: guidance,
    ...(guidance > 0 && negative ? { negative_prompt: negative } : {}),
    ...(settings.start ? { strength: settings.strength } : {}),
  };
}

const STREAM = { stream: true, partial_images: 3 };

function generation(settings) {
  return {
    url: endpoint("v1/images/generations"),
    body: JSON.stringify({ ...body(settings), ...STREAM }),
  };
}

// As JSON: in a form, browsers would turn every line break of the prompt into two characters.
async function edit(settings) {
  const image = await toDataUrl(settings.start);
  return {
    url: endpoint("v1/images/edits"),
    body: JSON.stringify({ ...body(settings), image, ...STREAM }),
  };
}

function toDataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new ApiError("The picture to start from cannot be read."));
    reader.readAsDataURL(blob);
  });
}

const authorization = (key) => (key ? { authorization: `Bearer ${key}` } : {});

async function send(url, options) {
  let response;
  try {
    response = await fetch(url, { ...options, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  const message = error?.message ?? `The server answered ${response.status}.`;
  throw new ApiError(message, { ...error, status: response.status });
}

/** Server-sent events, and comments, which an EventSource would swallow. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      // A picture comes in hundreds of chunks: joined once, at the blank line that ends an event.
      const parts = ((rest.length ? rest.pop() : "") + value).split("\n\n");
      while (parts.length > 1) {
        rest.push(parts.shift());
        yield parse(rest.join(""));
        rest = [];
      }
      // The last character stays in the joint: the blank line may be cut in two.
      rest.push(parts[0].slice(0, -1), parts[0].slice(-1));
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parse(block) {
  const event = {};
  for (const line of block.split("\n")) {
    if (line.startsWith(":")) event.comment = line.slice(1).trim();
    else if (line.startsWith("data:")) event.data = line.slice(5).trim();
  }
  return event;
}

function toBlob(base64, type) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let at = 0; at < text.length; at++) bytes[at] = text.charCodeAt(at);
  return new Blob([bytes], { type });
}
