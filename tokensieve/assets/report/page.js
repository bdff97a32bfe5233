"use strict";
/* Sorts a table by the column whose heading is clicked, largest number first; blank cells stay last. */
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => heading.firstElementChild.addEventListener("click", () => {
    const names = column === 0;
    const first = names ? "ascending" : "descending";
    const second = names ? "descending" : "ascending";
    const sorted = heading.getAttribute("aria-sort") === first ? second : first;
    headings.forEach((other) => other.setAttribute("aria-sort", "none"));
    heading.setAttribute("aria-sort", sorted);
    const sign = sorted === "ascending" ? 1 : -1;
    const value = (row) => row.cells[column].dataset.value;
    const rows = [...table.tBodies[0].rows];
    const blank = names ? [] : rows.filter((row) => value(row) === "");
    const filled = rows.filter((row) => !blank.includes(row));
    filled.sort((a, b) => sign * (names ? value(a).localeCompare(value(b)) : value(a) - value(b)));
    table.tBodies[0].append(...filled, ...blank);
  }));
}
/* Paper has no folds. */
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
