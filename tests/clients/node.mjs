// Prints the token ids that transformers.js generates greedily: node node.mjs FOLDER NAME QUESTION MAX_NEW_TOKENS
import { AutoModelForCausalLM, AutoTokenizer, env } from "@huggingface/transformers";

const [folder, name, question, tokens] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = folder;
const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModelForCausalLM.from_pretrained(name, { device: "cpu" });
const messages = [{ role: "user", content: question }];
const inputs = tokenizer.apply_chat_template(messages, { add_generation_prompt: true, return_dict: true });
const output = await model.generate({ ...inputs, max_new_tokens: Number(tokens), do_sample: false });
console.log(JSON.stringify(output.tolist()[0].map(Number)));
