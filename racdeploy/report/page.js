"use strict";
// What every page does by script: copy, mark wide tables, open everything for paper.

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// Copy buttons: what they copy is in the page, so they also work where it is a file on a disk.

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

// Tables that are wider than the screen say so.

function markWide() {
  for (const box of document.querySelectorAll(".scroll, nav > div")) {
    box.classList.toggle("wide", box.scrollWidth > box.clientWidth + 1);
  }
}

addEventListener("resize", markWide);
markWide();

// Paper cannot be opened: everything is, and afterwards closed again.

let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  for (const part of opened) { part.dispatchEvent(new Event("fill")); part.open = true; }
});
addEventListener("afterprint", () => { for (const part of opened) part.open = false; });
