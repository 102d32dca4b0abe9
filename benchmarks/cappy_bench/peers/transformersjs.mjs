/**
 * Scores with transformers.js on Node: AutoTokenizer and AutoModelForSequenceClassification, on its own onnxruntime-node.
 *
 *     NODE_PACKAGES=FOLDER/node_modules node transformersjs.mjs PRECISION MODEL
 *
 * A runner in another language: it answers the JSON lines of worker.py, which lies beside it, for the same MODEL. It
 * reads optimum's export, by the names that transformers.js gives its files: fp32 is onnx/model.onnx (dtype "fp32"),
 * int8 is onnx/model_quantized.onnx (dtype "q8"). Scores are raw logits; its pipeline would answer 1.0 for every pair, the
 * softmax of one label. Threads are set in `session_options`, which transformers.js hands to ONNX Runtime.
 *
 * Batching is left to the user, so pairs are sorted and batched as for the runners of batches.py.
 * So is truncation: with `truncation: true` transformers.js drops the end of the joined pair, its last </s> included,
 * and so loses the response first. Here the longer text of a pair that is too long is cut, as transformers does. An
 * empty response is no response to transformers.js (`<s>A</s>`): such pairs get other token ids and other scores.
 *
 * Packages are installed with --ignore-scripts: onnxruntime-node's install script only downloads CUDA, and fails where
 * it cannot. The packages hold all that a CPU needs.
 */

import { Console } from "node:console";
import {
  copyFileSync, existsSync, linkSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync,
} from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import { createInterface } from "node:readline";

const BATCH_TOKENS = 512; // as in batches.py
const DTYPES = { fp32: "fp32", int8: "q8" };
const MODEL_FILES = { fp32: "model.onnx", int8: "model_quantized.onnx" };
const OPTIMUM_FILES = { fp32: "model_optimized.onnx", int8: "model_quantized.onnx" }; // as in optimum_onnx.py
const PACKAGES = path.resolve(process.env.NODE_PACKAGES ?? "node_modules");

/** transformers.js with the model loaded: the Runner of peer.py. */
class Runner {
  computedTokens = 0;

  constructor(tokenizer, model, Tensor, maxLength) {
    Object.assign(this, { tokenizer, model, Tensor, maxLength });
  }

  /** Raw scores of the pairs, in input order. */
  async score(pairs) {
    const ids = this.tokenIds(pairs);
    const scores = new Array(ids.length);
    const lengths = ids.map((row) => row.length);
    for (const { rows, length } of planBatches(lengths, BATCH_TOKENS)) {
      const found = await this.scoreBatch(rows.map((row) => ids[row]), length);
      rows.forEach((row, place) => (scores[row] = found[place]));
      this.computedTokens += rows.length * length;
    }
    return scores;
  }

  /** The token ids of each pair, without padding. */
  tokenIds(pairs) {
    if (!pairs.length) return []; // the tokenizer refuses none
    const [first, second] = [0, 1].map((side) => pairs.map((pair) => pair[side]));
    const joined = this.tokenizer(first, { text_pair: second, truncation: false, return_tensor: false }).input_ids;
    return joined.map((ids, row) => (ids.length > this.maxLength ? this.truncate(ids, ...pairs[row]) : ids));
  }

  /** The token ids of a pair with its longer text cut to fit: `ids` are all of them, <s>A</s></s>B</s>. */
  truncate(ids, first, second) {
    const [a, b] = [first, second].map((text) => this.tokenizer.encode(text, { add_special_tokens: false }).length);
    const [keptA, keptB] = truncateLongestFirst(a, b, this.maxLength - (ids.length - a - b));
    return [...ids.slice(0, 1 + keptA), ...ids.slice(1 + a, 3 + a + keptB), ...ids.slice(3 + a + b)];
  }

  /** Scores of one batch, padded to `length`. */
  async scoreBatch(rows, length) {
    const ids = new BigInt64Array(rows.length * length).fill(BigInt(this.tokenizer.pad_token_id));
    const mask = new BigInt64Array(rows.length * length);
    rows.forEach((row, place) => {
      ids.set(row.map(BigInt), place * length);
      mask.fill(1n, place * length, place * length + row.length);
    });
    const tensor = (values) => new this.Tensor("int64", values, [rows.length, length]);
    const { logits } = await this.model({ input_ids: tensor(ids), attention_mask: tensor(mask) });
    return logits.data; // (batch, 1) float32
  }
}

/** `plan_batches` of cappy_engine.batching: rows of similar length together, longest first. */
function planBatches(lengths, maxBatchTokens) {
  const order = lengths.map((_, row) => row).sort((a, b) => lengths[b] - lengths[a]);
  const batches = [];
  for (let start = 0; start < order.length; start += batches.at(-1).rows.length) {
    const length = lengths[order[start]];
    const size = Math.max(1, Math.floor(maxBatchTokens / Math.max(1, length)));
    batches.push({ rows: order.slice(start, start + size), length });
  }
  return batches;
}

/** `truncate_longest_first` of cappy_engine.tokenizer: how many tokens of two texts are kept within `budget`. */
function truncateLongestFirst(first, second, budget) {
  const shorter = Math.min(first, second, Math.floor(budget / 2));
  return first > second ? [budget - shorter, shorter] : [shorter, budget - shorter];
}

/**
 * Lay out optimum's exports by the names that transformers.js gives them, with our bundle's config and tokenizer. It has
 * no export of its own, and its users do not have our bundle's graph.
 */
function prepare(model, precision) {
  const exported = path.join(model.folder, "..", "optimum_onnx", precision, OPTIMUM_FILES[precision]);
  if (!existsSync(exported)) throw new Error(`${exported} is not there: prepare the optimum runners first`);
  const folder = path.join(model.folder, precision);
  mkdirSync(path.join(folder, "onnx"), { recursive: true });
  for (const name of readdirSync(model.bundle).filter((name) => /\.(json|txt)$/.test(name))) {
    copyFileSync(path.join(model.bundle, name), path.join(folder, name));
  }
  const link = path.join(folder, "onnx", MODEL_FILES[precision]);
  rmSync(link, { force: true });
  linkSync(exported, link);
}

/** Load what `prepare` made for `model` (cappy_bench.peers.peer.Model as JSON), and nothing else. */
async function openRunner(model, precision) {
  const transformers = createRequire(path.join(PACKAGES, "..", "package.json"))("@huggingface/transformers");
  const { AutoModelForSequenceClassification, AutoTokenizer, Tensor, env } = transformers;
  env.allowRemoteModels = false;
  const folder = path.join(model.folder, precision);
  const tokenizer = await AutoTokenizer.from_pretrained(folder, { local_files_only: true });
  const loaded = await AutoModelForSequenceClassification.from_pretrained(folder, {
    dtype: DTYPES[precision],
    device: "cpu",
    local_files_only: true,
    session_options: { intraOpNumThreads: model.threads, interOpNumThreads: 1 },
  });
  return new Runner(tokenizer, loaded, Tensor, model.max_length ?? 512);
}

/** Do what `message` asks for; `state` holds the runner once it is open. */
async function answer(state, message) {
  if (message.do === "prepare") {
    prepare(state.model, state.precision);
    return { seconds: 0 };
  }
  if (message.do === "versions") return { versions: versions(message.packages) };
  if (message.do === "open") {
    state.runner = await openRunner(state.model, state.precision);
    return {};
  }
  if (!state.runner) throw new Error("the runner is not open");
  if (message.do === "token_ids") return { token_ids: state.runner.tokenIds(message.pairs) };
  if (message.do === "score") return score(state.runner, message);
  throw new Error(`unknown message '${message.do}'`);
}

async function score(runner, message) {
  forgetPeak();
  const before = runner.computedTokens;
  const [seconds, scores] = [[], []];
  for (const pairs of message.requests) {
    const started = performance.now();
    scores.push(await runner.score(pairs));
    seconds.push((performance.now() - started) / 1000);
  }
  return { seconds, scores, computed_tokens: runner.computedTokens - before, peak_bytes: peakBytes() };
}

function versions(packages) {
  const version = (name) => JSON.parse(readFileSync(path.join(PACKAGES, name, "package.json"), "utf8")).version;
  return Object.fromEntries(packages.map((name) => [name, version(name)]));
}

/** Start a new peak of resident memory, where the system can (Linux). */
function forgetPeak() {
  if (existsSync("/proc/self/clear_refs")) writeFileSync("/proc/self/clear_refs", "5");
}

/** The most memory that was resident since `forgetPeak` (elsewhere than on Linux: since the process began). */
function peakBytes() {
  if (!existsSync("/proc/self/status")) return process.resourceUsage().maxRSS * 1024;
  const found = /^VmHWM:\s+(\d+)/m.exec(readFileSync("/proc/self/status", "utf8"));
  return Number(found[1]) * 1024;
}

async function main([precision, model]) {
  const state = { precision, model: JSON.parse(model), runner: null };
  globalThis.console = new Console(process.stderr); // what a library prints must not come between the answers
  for await (const line of createInterface({ input: process.stdin, crlfDelay: Infinity })) {
    let found;
    try {
      found = await answer(state, JSON.parse(line));
    } catch (error) {
      console.error(error);
      found = { error: `${error.name}: ${error.message}` };
    }
    process.stdout.write(`${JSON.stringify(found)}\n`);
  }
}

await main(process.argv.slice(2));
