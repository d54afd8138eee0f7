// Asks the page in headless Chromium: node browser.mjs ADDRESS CHROMIUM PROFILE ENGINE QUESTION
// Prints what the page shows, how many of its states were painted, every address outside it that was asked for, and
// how many tokens there are when a second answer is stopped.
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
await page.evaluate(() => {
  self.painted = new Set();
  const paint = () => {
    self.painted.add(document.getElementById("thinking").textContent);
    requestAnimationFrame(paint);
  };
  paint();
});
await page.focus("#send"); // as with the keyboard
await page.keyboard.press("Enter");
await status("Done|Failed");
const text = async (id) => (await page.textContent(`#${id}`)).trim();
const shown = { status: await text("status"), thinking: await text("thinking"), answer: await text("answer") };
const painted = await page.evaluate(() => self.painted.size);
await page.click("#send");
await page.waitForFunction((whole) => {
  const text = document.getElementById("thinking").textContent;
  return text.length > 5 && text.length < whole - 5;
}, shown.thinking.length, { polling: "raf" });
await page.click("#stop");
await status("Done|Failed");
console.log(JSON.stringify({
  ...shown, painted, stopped: parseInt(await text("thinking-count")), model: await text("model"),
  isolated: await page.evaluate(() => self.crossOriginIsolated), outside, errors,
}));
await context.close();
