// Asks a racdeploy bundle in the browser. Thinking and answer are separated by token ids, as racdeploy does.
//
// The bundle is under /bundle/, the npm packages under /npm/; serve.py puts them there. Nothing comes from elsewhere.

import { AutoModelForCausalLM, AutoTokenizer, BaseStreamer, InterruptableStoppingCriteria, env } from "/npm/@huggingface/transformers/dist/transformers.min.js";

const BUNDLE = "/bundle/";
const SUFFIXES = { "model.onnx": "fp32", "model_fp16.onnx": "fp16", "model_quantized.onnx": "q8", "model_q4.onnx": "q4" };

env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = "/";
env.useBrowserCache = false;
env.backends.onnx.wasm.wasmPaths = "/npm/onnxruntime-web/dist/";
env.backends.onnx.wasm.proxy = true; // in a worker: else the page is not painted, nor a click heard, until the answer ends
env.backends.onnx.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;

const element = (id) => document.getElementById(id);

/** Tells thinking from answer, one token id at a time. */
export class Splitter {
  constructor(openIds, closeIds, promptIds) {
    this.tags = { thinking: closeIds, answer: openIds };
    this.parts = { thinking: [], answer: [] };
    this.part = "answer";
    for (const id of promptIds) this.feed(id);
    this.parts = { thinking: [], answer: [] }; // what the prompt says is no completion
  }

  feed(id) {
    const ids = this.parts[this.part];
    ids.push(id);
    const tag = this.tags[this.part];
    if (tag.length && tag.every((wanted, place) => ids[ids.length - tag.length + place] === wanted)) {
      ids.length -= tag.length;
      this.part = this.part === "thinking" ? "answer" : "thinking";
    }
  }
}

/** Shows what a splitter holds. */
class Page {
  constructor(tokenizer, splitter, endIds) {
    Object.assign(this, { tokenizer, splitter, endIds });
    element("thinking").textContent = element("answer").textContent = "";
  }

  feed(ids) {
    for (const id of ids) if (!this.endIds.includes(id)) this.splitter.feed(id);
    const { thinking, answer } = this.splitter.parts;
    for (const [name, part] of Object.entries({ thinking, answer })) {
      const text = part.length ? this.tokenizer.decode(part, { skip_special_tokens: false }) : "";
      element(name).textContent = text.trim().replace(/\ufffd+$/, ""); // half a character waits for its rest
    }
    element("thinking-count").textContent = `${thinking.length} tokens`;
    element("thinking").scrollTop = element("thinking").scrollHeight;
  }
}

/** transformers.js; the prompt comes first through the streamer and is left out. */
class OnnxEngine {
  static async load(artifact) {
    const engine = new OnnxEngine();
    const dtype = SUFFIXES[artifact.path.split("/").pop()];
    if (!dtype) throw new Error(`transformers.js does not load ${artifact.path}`);
    engine.model = await AutoModelForCausalLM.from_pretrained("bundle", { dtype, device: "wasm" });
    engine.stopping = new InterruptableStoppingCriteria();
    return engine;
  }

  async generate({ inputs, maxTokens, endIds, onIds }) {
    let prompted = false;
    class Streamer extends BaseStreamer {
      put(value) {
        if (prompted) onIds(value[0].map(Number));
        prompted = true;
      }
      end() {}
    }
    this.stopping.reset();
    const settings = { max_new_tokens: maxTokens, do_sample: false, eos_token_id: endIds };
    await this.model.generate({ ...inputs, ...settings, streamer: new Streamer(), stopping_criteria: this.stopping });
  }

  stop() {
    this.stopping.interrupt();
  }
}

/**
 * wllama keeps special tokens out of its text, and the tokens of half a character out of its ids: the ids count where
 * they say the text, or where there is none; otherwise the text gets ids again.
 */
class GgufEngine {
  static async load(artifact, contextTokens) {
    const { Wllama } = await import("/npm/@wllama/wllama/esm/index.js");
    const engine = new GgufEngine();
    engine.wllama = new Wllama({ default: "/npm/@wllama/wllama/esm/wasm/wllama.wasm" }, { allowOffline: true, suppressNativeLog: true });
    const file = await fetch(BUNDLE + artifact.path);
    if (!file.ok) throw new Error(`${artifact.path}: ${file.status} ${file.statusText}`);
    await engine.wllama.loadModel([await file.blob()], { n_ctx: contextTokens });
    return engine;
  }

  async generate({ prompt, tokenizer, maxTokens, onIds }) {
    this.abort = new AbortController();
    const settings = { prompt, max_tokens: maxTokens, temperature: 0, logprobs: 1 };
    try {
      const stream = { stream: true, abortSignal: this.abort.signal };
      for await (const { choices: [choice] } of await this.wllama.createCompletion({ ...settings, ...stream })) {
        const ids = choice?.logprobs?.content.map((token) => token.id) ?? [];
        const says = choice?.text && ids.length ? tokenizer.decode(ids) : "";
        onIds(says === choice?.text || !choice?.text ? ids : tokenizer.encode(choice.text, { add_special_tokens: false }));
      }
    } catch (error) {
      if (error.name !== "WllamaAbortError" && error.name !== "AbortError") throw error;
    }
  }

  stop() {
    this.abort?.abort();
  }
}

const ENGINES = { onnx: OnnxEngine, gguf: GgufEngine };

function say(text, isError = false) {
  element("status").textContent = text;
  element("status").classList.toggle("error", isError);
}

async function main() {
  const response = await fetch(`${BUNDLE}racdeploy.json`);
  if (!response.ok) throw new Error("there is no bundle under /bundle/: start serve.py with one");
  const manifest = await response.json();
  const tokenizer = await AutoTokenizer.from_pretrained("bundle");
  const ids = (text) => (text ? tokenizer.encode(text, { add_special_tokens: false }) : []);
  const { open_tag: openTag, close_tag: closeTag, eos_ids: endIds } = manifest.tokenizer;
  const artifacts = Object.fromEntries(manifest.artifacts.map((artifact) => [artifact.format, artifact]));
  const loaded = {};

  const zeros = Math.round(100 * manifest.pruning.sparsity);
  const sizes = manifest.artifacts.map(({ format, quant, size_bytes: size }) => `${format} ${quant}, ${(size / 1e6).toFixed(1)} MB`);
  element("model").textContent = `${manifest.base.name}, ${zeros} % zeros: ${sizes.join("; ")}`;
  for (const input of document.querySelectorAll("[name=engine]")) {
    input.disabled = !artifacts[input.value];
    input.checked = manifest.artifacts[0].format === input.value;
  }
  element("send").disabled = false;

  let engine = null;
  element("stop").addEventListener("click", () => engine?.stop());
  element("ask").addEventListener("submit", async (event) => {
    event.preventDefault();
    const format = new FormData(event.target).get("engine");
    element("send").disabled = true;
    try {
      say("Loading the model …");
      engine = loaded[format] ??= await ENGINES[format].load(artifacts[format], manifest.generation.context_tokens);
      const messages = [{ role: "user", content: element("question").value }];
      const template = { add_generation_prompt: true };
      const inputs = tokenizer.apply_chat_template(messages, { ...template, return_dict: true });
      const promptIds = inputs.input_ids.tolist()[0].map(Number);
      const page = new Page(tokenizer, new Splitter(ids(openTag), ids(closeTag), promptIds), endIds);
      const maxTokens = Math.min(manifest.generation.max_new_tokens, manifest.generation.context_tokens - promptIds.length);
      let count = 0;
      element("stop").disabled = false;
      say("Thinking …");
      const started = performance.now();
      const onIds = (news) => page.feed(news, (count += news.length));
      const prompt = tokenizer.apply_chat_template(messages, { ...template, tokenize: false });
      await engine.generate({ inputs, prompt, tokenizer, maxTokens, endIds, onIds });
      const seconds = (performance.now() - started) / 1000;
      say(`Done: ${count} tokens in ${seconds.toFixed(1)} s.`);
    } catch (error) {
      console.error(error);
      say(`Failed: ${error.message ?? error}`, true);
    } finally {
      element("send").disabled = false;
      element("stop").disabled = true;
    }
  });
  say("Ready.");
}

main().catch((error) => say(`Failed: ${error.message ?? error}`, true));
