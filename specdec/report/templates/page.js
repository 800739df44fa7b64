// Sort tables by a click on a heading, and filter long ones.
const number = (text) => (isNaN(parseFloat(text)) ? -Number.MAX_VALUE : parseFloat(text));
Tablesort.extend("number", () => false, (a, b) => number(b) - number(a));
Tablesort.extend("text", () => true, (a, b) => b.localeCompare(a, "en", { numeric: true }));
for (const table of document.querySelectorAll("table")) {
  new Tablesort(table);
  const rows = [...table.tBodies[0].rows];
  if (table.closest("details")) {
    const box = document.createElement("input");
    Object.assign(box, { type: "search", placeholder: "filter rows", ariaLabel: "filter rows" });
    const holds = (row) => row.textContent.toLowerCase().includes(box.value.toLowerCase());
    box.oninput = () => rows.forEach((row) => (row.hidden = !holds(row)));
    table.parentElement.before(box);
  }
}
for (const link of document.querySelectorAll("th a"))
  for (const type of ["click", "keydown"])
    link.addEventListener(type, (event) => event.stopPropagation());
