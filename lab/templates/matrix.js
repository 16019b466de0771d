"use strict";
// A button of a cell (data-cell "TRUE,PREDICTED") shows the pictures that the run kept of it.
{
  const data = JSON.parse(document.getElementById("data").textContent);
  const behind = document.getElementById("behind");
  const buttons = [...document.querySelectorAll("button[data-cell]")];
  const said = document.getElementById("said-cells");
  const matrix = document.getElementById("matrix");
  const percent = (share) => `${(100 * share).toFixed(1)} %`;

  function described(button) {
    const [truth, predicted] = button.dataset.cell.split(",").map(Number);
    const count = Number(button.dataset.count || button.textContent.replaceAll(",", ""));
    const pair = `true ${data.names[truth]}, predicted ${data.names[predicted]}`;
    const share = percent(count / data.totals[truth]);
    return { truth, predicted, count, text: `${pair}: ${count} (${share} of the true class)` };
  }

  function element(name, text) {
    const made = document.createElement(name);
    made.textContent = text; // never as HTML: class names may be a stranger's
    return made;
  }

  function show(button) {
    const { truth, predicted, count, text } = described(button);
    const found = data.pictures.filter((p) => p[0] === truth && p[1] === predicted);
    found.sort((a, b) => b[3] - a[3]);
    const list = document.createElement("ul");
    for (const [, , name, confidence, source] of found) {
      const item = document.createElement("li");
      const image = new Image();
      image.src = source;
      image.alt = `test sample ${name}`;
      item.append(image, name, document.createElement("br"), `${percent(confidence)} sure`);
      list.append(item);
    }
    const heading = element("h3", text);
    const shown = found.length
      ? `${found.length} of ${count} pictures shown, the most confident first.`
      : `No picture of these ${count} is kept.`;
    behind.replaceChildren(heading, element("p", shown));
    said.textContent = `${text}. ${shown}`;
    if (found.length) behind.append(list);
    for (const other of buttons) {
      other.setAttribute("aria-pressed", String(other.dataset.cell === button.dataset.cell));
    }
    behind.scrollIntoView({ block: "nearest" });
  }

  for (const button of buttons) {
    button.addEventListener("click", () => show(button));
  }

  if (matrix) {
    // One stop of the Tab key; arrow keys go on to the next cell that has a button.
    const inside = [...matrix.querySelectorAll("button")];
    inside.forEach((button, number) => (button.tabIndex = number ? -1 : 0));
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    matrix.addEventListener("keydown", (event) => {
      const move = moves[event.key];
      if (!move || event.target.tagName !== "BUTTON") return;
      event.preventDefault();
      const cell = event.target.parentElement;
      let [row, column] = [cell.parentElement.rowIndex, cell.cellIndex];
      for (;;) {
        row += move[0];
        column += move[1];
        const next = matrix.rows[row]?.cells[column];
        if (!next || next.tagName === "TH") return;
        const button = next.querySelector("button");
        if (button) return button.focus();
      }
    });
    matrix.addEventListener("focusin", ({ target }) => {
      inside.forEach((button) => (button.tabIndex = button === target ? 0 : -1));
      target.ariaLabel = described(target).text;
    });
    matrix.addEventListener("pointerover", ({ target }) => {
      if (target.dataset.cell) target.title = described(target).text;
    });
  }
}
