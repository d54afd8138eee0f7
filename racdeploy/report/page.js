"use strict";
// Script of every page: copy buttons, marks of wide tables, everything open for print.

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// Copy buttons: their text is in the page, so they also work for a local file.

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = element("textarea");
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
}

for (const button of document.querySelectorAll("button.copy")) {
  const label = button.textContent;
  button.hidden = false;
  button.addEventListener("click", async () => {
    await copy(button.dataset.copy);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = label; }, 1500);
  });
}

// Mark tables that are wider than the screen.

function markWide() {
  for (const box of document.querySelectorAll(".scroll, nav > div")) {
    box.classList.toggle("wide", box.scrollWidth > box.clientWidth + 1);
  }
}

addEventListener("resize", markWide);
markWide();

// Open every detail for print, and close it again afterwards.

let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  for (const part of opened) { part.dispatchEvent(new Event("fill")); part.open = true; }
});
addEventListener("afterprint", () => { for (const part of opened) part.open = false; });
