// Asks the page in headless Chromium: node browser.mjs ADDRESS CHROMIUM PROFILE ENGINE QUESTION
// Prints what the page shows, and every address outside it that was asked for.
import { chromium } from "playwright-core";

const [address, executablePath, profile, engine, question] = process.argv.slice(2);
const quiet = ["quic", "background-networking", "component-update", "sync"].map((name) => `--disable-${name}`);
const args = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", ...quiet];
const context = await chromium.launchPersistentContext(profile, { executablePath, args });
const page = await context.newPage();
const outside = [];
const errors = [];
page.on("request", (request) => {
  const url = request.url();
  if (!url.startsWith(address) && !url.startsWith("blob:") && !url.startsWith("data:")) outside.push(url);
});
page.on("pageerror", (error) => errors.push(error.message));
const status = (pattern) => page.waitForFunction(
  (source) => new RegExp(source).test(document.getElementById("status").textContent), pattern, { timeout: 120000 });
await page.goto(address);
await status("Ready|Failed");
await page.check(`[value=${engine}]`);
await page.fill("#question", question);
await page.focus("#send"); // as with the keyboard
await page.keyboard.press("Enter");
await status("Done|Failed");
const text = async (id) => (await page.textContent(`#${id}`)).trim();
console.log(JSON.stringify({
  status: await text("status"), thinking: await text("thinking"), answer: await text("answer"),
  model: await text("model"), isolated: await page.evaluate(() => self.crossOriginIsolated), outside, errors,
}));
await context.close();
