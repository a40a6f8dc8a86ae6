"use strict";
// What a reader may do with the page: sort a table, copy it, hide a method, keep a figure. All of it can be read without.
const UNITS = { k: 1e3, M: 1e6, G: 1e9, T: 1e12, P: 1e15 };

function number(text) {  // "92.5 ± 1.4", "> 1,235", "1.23 M", "88.1 %": what they begin with
  const found = text.match(/^[^\d+-]*([+-]?\d[\d,]*\.?\d*)(?: ([kMGTP])\b)?/);
  return found ? Number(found[1].replaceAll(",", "")) * (UNITS[found[2]] || 1) : NaN;
}

function compared(a, b) {  // what is no number comes last
  const [x, y] = [number(a), number(b)];
  if (Number.isNaN(x) && Number.isNaN(y)) return a.localeCompare(b);
  return Number.isNaN(x) ? 1 : Number.isNaN(y) ? -1 : x - y;
}

function sort(head, place) {
  const body = head.closest("table").tBodies[0];
  const down = head.getAttribute("aria-sort") === "ascending";
  const text = (row) => row.cells[place].textContent;
  const order = (a, b) => place ? compared(text(a), text(b)) : text(a).localeCompare(text(b));
  const rows = [...body.rows].sort((a, b) => down ? order(b, a) : order(a, b));
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  body.append(...rows);
}

function csv(table) {
  const cell = (each) => `"${each.textContent.trim().replaceAll('"', '""')}"`;
  return [...table.rows].map((row) => [...row.cells].map(cell).join(",")).join("\r\n") + "\r\n";
}

function save(name, text, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function alone(svg) {  // a figure as a file: black on white, whatever the page is
  const copy = svg.cloneNode(true);
  copy.setAttribute("color", "#000000");
  copy.setAttribute("style", "--page: #ffffff");
  return new XMLSerializer().serializeToString(copy);
}

function button(text, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.addEventListener("click", () => act(made));
  return made;
}

for (const table of document.querySelectorAll("table")) {
  [...table.tHead.rows[0].cells].forEach((head, place) => {
    const name = head.textContent;
    head.replaceChildren(button(name, () => sort(head, place)));
  });
  const tools = document.createElement("div");
  tools.className = "tools";
  tools.append(button("copy as csv", async (pressed) => {
    try {
      await navigator.clipboard.writeText(csv(table));
      pressed.textContent = "copied";
    } catch {  // no clipboard for a page that is a file
      save("table.csv", csv(table), "text/csv");
    }
  }));
  table.parentNode.after(tools);
}

for (const figure of document.querySelectorAll("figure")) {
  const shown = () => [...figure.querySelectorAll("svg")].find((svg) => svg.getClientRects().length);
  figure.querySelector(".tools").prepend(
    button("figure (svg)", () => save(`${figure.id}.svg`, alone(shown()), "image/svg+xml")));
}

for (const choice of document.querySelectorAll("fieldset")) {
  choice.hidden = false;
  choice.addEventListener("change", ({ target }) => {
    for (const svg of choice.closest("section").querySelectorAll("figure svg"))
      for (const part of svg.querySelectorAll(`[id$="-${target.value}"], [id$="-${target.value}-band"]`))
        part.style.display = target.checked ? "" : "none";
  });
}
