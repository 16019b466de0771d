"use strict";
// In tables of class "sortable", a click on a heading sorts by that column; a second click reverses
// the order.
for (const table of document.querySelectorAll("table.sortable")) {
  const status = document.getElementById(table.dataset.status);
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const ascending = head.getAttribute("aria-sort") !== "ascending";
      const key = (row) => {
        const cell = row.cells[column];
        return "v" in cell.dataset ? Number(cell.dataset.v) : cell.textContent;
      };
      const compare = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1; // numbers before text
        return typeof x === "number" ? x - y : x.localeCompare(y, undefined, { numeric: true });
      };
      const body = table.tBodies[0];
      const rows = [...body.rows].sort((a, b) => (ascending ? compare(a, b) : compare(b, a)));
      body.append(...rows);
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      status.textContent = `Sorted by ${head.textContent.trim()}, ${head.getAttribute("aria-sort")}.`;
    });
  });
}
