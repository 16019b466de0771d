"use strict";
// Tables of class "sortable": a click on a head sorts by that column, another one turns it round.
for (const table of document.querySelectorAll("table.sortable")) {
  const said = document.getElementById(table.dataset.said);
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
        if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1; // numbers before words
        return typeof x === "number" ? x - y : x.localeCompare(y, undefined, { numeric: true });
      };
      const body = table.tBodies[0];
      const rows = [...body.rows].sort((a, b) => (ascending ? compare(a, b) : compare(b, a)));
      body.append(...rows);
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      said.textContent = `Sorted by ${head.textContent.trim()}, ${head.getAttribute("aria-sort")}.`;
    });
  });
}
