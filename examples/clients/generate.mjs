// A bundle in Node.js, unchanged: greedy tokens as alloc-run's, told as they come.
//
//     cd examples/clients && npm install --ignore-scripts
//     node generate.mjs ../../bundle --prompt "The committee" [--max-new-tokens 40]
//     node generate.mjs ../../bundle --message "Hello"        # in the words of its chat template
//
// --ignore-scripts keeps onnxruntime-node from fetching CUDA; the CPU's part is in the package.
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { Template } from "@huggingface/jinja";
import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-node";

const TYPES = { float32: Float32Array, float16: Uint16Array, int8: Int8Array };

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    prompt: { type: "string" },
    message: { type: "string" },
    "max-new-tokens": { type: "string", default: "40" },
    json: { type: "boolean", default: false },
  },
});
const [bundle] = positionals;
if (!bundle || (values.prompt === undefined) === (values.message === undefined)) {
  console.error("Give a bundle's folder, and either --prompt or --message.");
  process.exit(2);
}
const read = (name) => readFileSync(join(bundle, name), "utf8");
const config = JSON.parse(read("tokenizer_config.json"));
const tokenizer = new Tokenizer(JSON.parse(read("tokenizer.json")), config);
const { eos_token_id } = JSON.parse(read("generation_config.json"));
const ends = new Set([eos_token_id].flat());

function chatPrompt(message) {
  if (!existsSync(join(bundle, "chat_template.jinja"))) {
    console.error(`${bundle} has no chat template: its model continues texts. Give a --prompt.`);
    process.exit(1);
  }
  return new Template(read("chat_template.jinja")).render({
    messages: [{ role: "user", content: message }],
    add_generation_prompt: true,
    bos_token: config.bos_token,
    eos_token: config.eos_token,
  });
}

const integers = (numbers, columns) =>
  new ort.Tensor("int64", BigInt64Array.from(numbers, BigInt), [1, columns]);

// Without a past: the cache's shapes are the graph's, with a batch of 1 and 0 columns.
function emptyCache(session) {
  const cache = {};
  for (const { name, type, shape } of session.inputMetadata) {
    if (!name.startsWith("past_key_values.")) continue;
    const sizes = shape.map((size) =>
      typeof size === "number" ? size : size.includes("past") ? 0 : 1);
    cache[name] = new ort.Tensor(type, new TYPES[type](0), sizes);
  }
  return cache;
}

async function* generate(session, ids, most) {
  let cache = emptyCache(session);
  let tokens = ids;
  for (let past = 0, step = 0; step < most; step++) {
    const length = past + tokens.length;
    const inputs = {
      input_ids: integers(tokens, tokens.length),
      attention_mask: integers(Array(length).fill(1), length),
      position_ids: integers(tokens.map((_, place) => past + place), tokens.length),
    };
    for (const name of Object.keys(inputs)) {
      if (!session.inputNames.includes(name)) delete inputs[name];
    }
    const outputs = await session.run({ ...inputs, ...cache });
    const { data, dims } = outputs.logits;
    const last = data.subarray(data.length - dims.at(-1));
    const token = last.reduce((best, logit, id) => (logit > last[best] ? id : best), 0);
    yield token;
    if (ends.has(token)) return;
    cache = Object.fromEntries(Object.keys(cache).map((name) =>
      [name, outputs[name.replace("past_key_values", "present")]]));
    [past, tokens] = [length, [token]];
  }
}

const session = await ort.InferenceSession.create(join(bundle, "model.onnx"), {
  logSeverityLevel: 3, // it warns of the inputs that may be left out
});
const chat = values.message !== undefined;
const text = chat ? chatPrompt(values.message) : values.prompt;
const { ids } = tokenizer.encode(text, { add_special_tokens: !chat });
const made = [];
let told = "";
for await (const token of generate(session, ids, Number(values["max-new-tokens"]))) {
  made.push(token);
  // What ends in half a character waits for the rest.
  const whole = tokenizer.decode(made, { skip_special_tokens: true });
  if (!values.json && !whole.endsWith("\ufffd")) {
    process.stdout.write(whole.slice(told.length));
    told = whole;
  }
}
const rest = tokenizer.decode(made, { skip_special_tokens: true }).slice(told.length);
console.log(values.json ? JSON.stringify({ prompt_ids: ids, ids: made }) : rest);
