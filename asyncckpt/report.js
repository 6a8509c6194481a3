"use strict";
// Under the pointer: the nearest mark of a chart, in words. All of it stands in the marks' titles as well.
for (const figure of document.querySelectorAll("figure")) {
  const svg = figure.querySelector("svg");
  const said = figure.querySelector("output");
  const marks = Array.from(svg.querySelectorAll("path[data-x]"), (path) => [Number(path.dataset.x), path]);
  let shown = null;
  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * 1000;
    let best = null;
    for (const mark of marks) {
      if (best === null || Math.abs(mark[0] - x) < Math.abs(best[0] - x)) best = mark;
    }
    if (best === null) return;
    if (shown) shown.classList.remove("at");
    shown = best[1];
    shown.classList.add("at");
    said.textContent = shown.querySelector("title").textContent;
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
}
// A click on a heading sorts the table.
for (const table of document.querySelectorAll("table.sorted")) {
  table.querySelectorAll("th").forEach((heading, column) => {
    const button = document.createElement("button");
    button.textContent = heading.textContent;
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const rising = heading.getAttribute("aria-sort") === "descending";
      for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const value = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
      const body = table.tBodies[0];
      const rows = Array.from(body.rows).sort((a, b) => {
        const [p, q] = [value(a), value(b)];
        const order = p !== "" && q !== "" && !isNaN(p) && !isNaN(q) ? p - q : p.localeCompare(q);
        return rising ? order : -order;
      });
      body.replaceChildren(...rows);
    });
  });
}
document.documentElement.dataset.ready = "yes";
