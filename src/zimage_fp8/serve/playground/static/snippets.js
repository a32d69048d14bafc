// A picture's settings as a program that draws it again.

import { body, endpoint } from "./api.js";

const KEY = "ZIMAGE_FP8_API_KEY";

export function asCurl(settings, needsKey) {
  const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
  const key = needsKey ? [`-H "Authorization: Bearer $${KEY}"`] : [];
  const answer = [`-H 'Accept: image/png'`, `-o picture.png`];
  const parts = settings.start
    ? [
        `curl ${quoted(endpoint("v1/images/edits"))}`,
        ...key,
        `-F image=@start.png`,
        ...Object.entries(body(settings)).map(([k, v]) => `--form-string ${quoted(`${k}=${v}`)}`),
        ...answer,
      ]
    : [
        `curl ${quoted(endpoint("v1/images/generations"))}`,
        ...key,
        `-H 'Content-Type: application/json'`,
        ...answer,
        `-d ${quoted(JSON.stringify(body(settings), null, 2))}`,
      ];
  return parts.join(" \\\n  ");
}

// OpenAI's package takes these by name; whatever else there is travels in extra_body.
const NAMED = ["model", "prompt", "size"];

export function asPython(settings, needsKey) {
  const fields = Object.entries(body(settings));
  const named = fields.filter(([field]) => NAMED.includes(field));
  const extra = Object.fromEntries(fields.filter(([field]) => !NAMED.includes(field)));
  const python = JSON.stringify; // strings and numbers are written alike
  const lines = [
    `import base64`,
    ...(needsKey ? [`import os`] : []),
    `from openai import OpenAI`,
    ``,
    `client = OpenAI(`,
    `    base_url=${python(endpoint("v1"))},`,
    `    api_key=${needsKey ? `os.environ[${python(KEY)}]` : python("none")},`,
    `)`,
    `answer = client.images.${settings.start ? "edit" : "generate"}(`,
    ...(settings.start ? [`    image=open("start.png", "rb"),`] : []),
    ...named.map(([field, value]) => `    ${field}=${python(value)},`),
    `    extra_body=${python(extra, null, 1).replaceAll(/\n */g, " ")},`,
    `)`,
    `with open("picture.png", "wb") as file:`,
    `    file.write(base64.b64decode(answer.data[0].b64_json))`,
  ];
  return lines.join("\n");
}
