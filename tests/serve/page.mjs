// Drives the server's page in Chromium: node page.mjs URL FOLDER PLAIN. FOLDER is for screenshots, or empty. PLAIN is a
// server whose checkpoint was not calibrated. Prints a line of JSON for each thing that was seen.
// $LEPTON_PLAYWRIGHT is a folder whose node_modules hold playwright-core, $LEPTON_CHROMIUM the browser's program.
import { createRequire } from "node:module";
import { join } from "node:path";

const require = createRequire(join(process.env.LEPTON_PLAYWRIGHT, "index.js"));
const { chromium } = require("playwright-core");
const [url, shots, plain] = process.argv.slice(2);
const say = (name, value) => console.log(JSON.stringify([name, value]));

const browser = await chromium.launch({
  executablePath: process.env.LEPTON_CHROMIUM,
  args: ["--no-sandbox", "--headless=shell", "--disable-gpu", "--single-process", "--no-zygote"],
});
const page = await browser.newPage({ viewport: { width: 1100, height: 800 }, reducedMotion: "reduce" });
const errors = [];
page.on("pageerror", (error) => errors.push(String(error)));
page.on("console", (message) => message.type() === "error" && errors.push(message.text()));
const shot = async (name) => shots && page.screenshot({ path: join(shots, `${name}.png`), fullPage: true });
const text = (id) => page.locator(`#${id}`).innerText();
const finished = () => page.waitForFunction(() => !document.getElementById("write").disabled
  && document.getElementById("stop").disabled && document.getElementById("figures").textContent.includes("seed"));
const written = () => page.evaluate(() => document.getElementById("text").textContent);

// Nothing is calibrated: two sliders are off, and say why.
const sliders = () => page.evaluate(() => ["depth", "cost", "think", "risk"].map((id) => document.getElementById(id).disabled));
await page.goto(plain);
await page.waitForFunction(() => document.getElementById("model").textContent.includes("million"));
say("not calibrated", [await sliders(), await text("risk-why"), await text("cost-why"), await text("risk-is")]);

await page.goto(url);
await page.waitForFunction(() => document.getElementById("model").textContent.includes("million"));
say("model", await text("model"));

// By keyboard alone: write, walk over the tokens, look at one, take an alternative.
await page.focus("#seed");
await page.keyboard.type("5");
await page.focus("#tokens");
await page.keyboard.press("Control+A");
await page.keyboard.type("24");
await page.focus("#temperature");
await page.keyboard.press("End");
for (let i = 0; i < 20; i++) await page.keyboard.press("ArrowLeft");
say("temperature", await page.inputValue("#temperature"));
await page.focus("#prompt");
await page.keyboard.press("Control+A");
await page.keyboard.type("fox");
await page.keyboard.press("Control+Enter");
await finished();
say("written", await written());
say("figures", await text("figures"));
say("labels", await page.locator(".token").evaluateAll((all) => all.map((each) => each.getAttribute("aria-label"))));
await page.keyboard.press("Tab"); // Write on
await page.keyboard.press("Tab"); // Take over (Stop is disabled)
await page.keyboard.press("Tab"); // the first token
await page.keyboard.press("ArrowRight");
await page.keyboard.press("Enter");
say("focused", await page.evaluate(() => document.activeElement.dataset.i));
say("chosen", await text("chosen"));
say("alternatives", await page.locator("#list button").count());
await shot("light");
const other = page.locator("#list button:not([disabled]):not([aria-current=true])").first();
const name = await other.locator("code").innerText();
const begin = await page.evaluate(() => tokens[1].begin);
const before = await written();
await other.focus();
await page.keyboard.press("Enter");
await finished();
say("alternative", [name, before.slice(0, 3 + begin), await page.locator("#text .given").innerText()]);

// Shades.
say("unsure", await page.evaluate(() => tokens.map((each) => each.uncertainty)));
for (const shade of ["uncertainty", "depth", "drafted", "none"]) {
  await page.selectOption("#shade", shade);
  say("shade", [shade, await page.evaluate(() => [...document.querySelectorAll(".token")]
    .map((each) => getComputedStyle(each).backgroundColor))]);
}
await page.selectOption("#shade", "uncertainty");

// Abstention and cost, by keyboard.
const marked = () => page.locator("#text .token").evaluateAll((all) => all.map((each) =>
  [each.classList.contains("is-abstained"), each.getAttribute("aria-label").includes(": the model abstains"),
    getComputedStyle(each, "::after").content]));
const sent = [];
page.on("request", (each) => each.method() === "POST" && each.url().endsWith("completions") && sent.push(each.postDataJSON()));
const asked = () => { const { abstain_at, max_cost, depth, think } = sent.at(-1); return [abstain_at, max_cost, depth, think]; };
const again = async () => { await page.fill("#prompt", "fox"); await page.click("#write"); await finished(); };
say("calibrated", [await sliders(), await text("risk-why"), await text("cost-why")]);
await page.focus("#risk");
await page.keyboard.press("ArrowRight");
say("risk", [await sliders(), await text("risk-is"), await text("fixed"), await text("cost-why")]);
await again();
say("abstained", [await text("abstained"), await marked(), await written(), asked()]);
await shot("abstained");
await page.focus("#risk");
await page.keyboard.press("ArrowRight");
await again();
say("abstained from all", [await text("abstained"), (await marked()).every(([mark]) => mark), asked()]);
await page.locator("#risk").fill("0");
await page.focus("#cost");
await page.keyboard.press("ArrowRight");
say("cost", [await sliders(), await text("cost-is"), await text("fixed")]);
await again();
say("at a cost", [await written(), await text("abstained"), (await marked()).some(([mark]) => mark), asked()]);
await page.locator("#cost").fill("0");
say("off again", await sliders());

// Narrow, dark, enlarged.
await page.setViewportSize({ width: 375, height: 700 });
say("narrow", await page.evaluate(() => document.documentElement.scrollWidth));
const light = await page.evaluate(() => getComputedStyle(document.documentElement).backgroundColor);
await page.emulateMedia({ colorScheme: "dark" });
say("dark", [light, await page.evaluate(() => getComputedStyle(document.documentElement).backgroundColor)]);
await shot("narrow-dark");
await page.setViewportSize({ width: 550, height: 400 }); // what 200 % leave of 1100 x 800
say("enlarged", await page.evaluate(() => document.documentElement.scrollWidth));
await page.emulateMedia({ colorScheme: "light" });
await page.setViewportSize({ width: 1100, height: 800 });

// Stop, and a mistake.
await page.fill("#tokens", "4000");
await page.fill("#seed", "");
await page.locator("#temperature").fill("0");
await page.fill("#prompt", "fox");
await page.click("#write");
await page.waitForFunction(() => document.querySelectorAll(".token").length > 5);
await page.keyboard.press("Escape");
await page.waitForFunction(() => document.getElementById("figures").textContent.includes("stopped"));
say("stopped", await text("figures"));
await page.fill("#tokens", "1000000");
await page.evaluate(() => document.getElementById("form").setAttribute("novalidate", ""));
await page.click("#write");
await page.waitForFunction(() => document.getElementById("notice").textContent);
say("mistake", await text("notice"));
await page.fill("#tokens", "4000");

// A conversation, by keyboard alone: two turns, what is remembered, and one crystal less.
const crystals = () => page.locator("#crystals li").allInnerTexts();
const settled = () => page.waitForFunction(() => !running && !document.getElementById("save").disabled
  && document.getElementById("crystals").getAttribute("aria-busy") === "false");
const send = async (message) => {
  await page.focus("#prompt");
  await page.keyboard.type(message);
  await page.keyboard.press("Control+Enter");
  await page.waitForFunction(() => running);
  await settled();
};
const turn = async () => say("turn", [await written(), await page.evaluate(() => talk.messages),
  Number(await page.inputValue("#temperature")), Number(await page.inputValue("#tokens"))]);
await page.focus("#mode");
await page.keyboard.press("ArrowDown");
say("talk named", [await text("prompt-is"), await text("write"), await page.locator("#keep").isVisible()]);
say("talk begins", [await text("memory"), await page.locator("#save").isDisabled()]);
await page.fill("#prompt", "");
await page.fill("#seed", "7");
await page.fill("#tokens", "30");
await page.locator("#temperature").fill("1");
await send("The quick brown fox jumps over the lazy dog.");
await turn();
await send("and then?");
await turn();
say("tokens", await page.locator(".token").count());
await page.locator(".token").nth(1).focus();
await page.keyboard.press("Enter");
say("talk alternatives", await page.locator("#list button:not([disabled])").count());
say("crystals", await crystals());
await shot("talk");
const many = (await crystals()).length;
await page.locator("#crystals button").nth(1).focus();
await page.keyboard.press("Enter");
await page.waitForFunction((count) => document.querySelectorAll("#crystals li").length === count - 1, many);
say("crystals", await crystals());
say("focus", await page.evaluate(() => document.activeElement.getAttribute("aria-label") ?? ""));
await page.setViewportSize({ width: 375, height: 700 });
say("narrow talk", await page.evaluate(() => document.documentElement.scrollWidth));
await page.setViewportSize({ width: 1100, height: 800 });

// Saved, reloaded, begun anew, and loaded.
const [download] = await Promise.all([page.waitForEvent("download"), page.click("#save")]);
const file = await download.path();
const before_reload = await written();
await page.reload();
await settled();
say("reloaded", [before_reload === await written(), await crystals(), await page.inputValue("#mode")]);
const old = await page.evaluate(() => talk.id);
await page.click("#fresh");
await page.waitForFunction(() => document.getElementById("save").disabled && !talk.id);
say("fresh", [await written(), await crystals(), await page.evaluate(async (id) =>
  (await fetch(`v1/conversations/${id}`)).status, old)]);
await page.setInputFiles("#file", { name: "x.json", mimeType: "application/json", buffer: Buffer.from("{}") });
await page.waitForFunction(() => document.getElementById("notice").textContent);
say("no file", await text("notice"));
await page.setInputFiles("#file", file);
await settled();
say("loaded", [before_reload === await written(), await crystals(), await text("notice")]);

// An answer that is stopped stays said, and a server that has forgotten the conversation reads it again.
await page.fill("#tokens", "4000");
await page.fill("#prompt", "more");
await page.click("#write");
await page.waitForFunction((count) => document.querySelectorAll(".token").length > count, 5);
await page.click("#stop");
await settled();
say("stopped turn", [await page.evaluate(() => [talk.unread, talk.messages.length]), await text("figures")]);
await page.fill("#tokens", "12");
await page.fill("#seed", "7");
await send("x"); // not what the whole conversation gives: a crystal is missing
say("after the stop", [await written(), await page.evaluate(() => talk.messages), await page.evaluate(() => talk.unread)]);
await page.evaluate(async () => { await api("DELETE", `conversations/${talk.id}`); });
await send("y");
await turn();
say("kept", await page.evaluate(() => talk.unread));
await page.selectOption("#mode", "text");
say("text again", [await written(), await text("write")]);
say("errors", errors.filter((each) => !/ 40[049] /.test(each)));

// The server dies in the middle of a stream.
await page.fill("#tokens", "4000");
await page.fill("#prompt", "fox");
await page.fill("#seed", "");
await page.click("#write");
await page.waitForFunction(() => document.querySelectorAll(".token").length > 5);
say("kill", null);
await page.waitForFunction(() => document.getElementById("notice").textContent);
say("died", [await text("notice"), await page.locator("#write").isEnabled()]);
await browser.close();
