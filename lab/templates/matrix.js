"use strict";
// Clicking a cell (data-cell "TRUE,PREDICTED") shows the saved images of its samples.
{
  const data = JSON.parse(document.getElementById("data").textContent);
  const panel = document.getElementById("cell");
  const buttons = [...document.querySelectorAll("button[data-cell]")];
  const status = document.getElementById("status-cells");
  const matrix = document.getElementById("matrix");
  const percent = (fraction) => `${(100 * fraction).toFixed(1)} %`;

  function describe(button) {
    const [truth, predicted] = button.dataset.cell.split(",").map(Number);
    const count = Number(button.dataset.count || button.textContent.replaceAll(",", ""));
    const pair = `true ${data.names[truth]}, predicted ${data.names[predicted]}`;
    const fraction = percent(count / data.totals[truth]);
    return { truth, predicted, count, text: `${pair}: ${count} (${fraction} of the true class)` };
  }

  function element(name, text) {
    const node = document.createElement(name);
    node.textContent = text; // never as HTML: class names may come from strangers
    return node;
  }

  // A mistake: its image, the image with its heat map, its classes and their probabilities.
  function card([truth, predicted, name, confidence, source, top, explained]) {
    const item = document.createElement("li");
    const pictures = document.createElement("div");
    for (const [uri, alt] of [[source, `test sample ${name}`], [explained, "its Grad-CAM"]]) {
      if (!uri) continue;
      const image = new Image();
      image.src = uri;
      image.alt = alt;
      pictures.append(image);
    }
    const classes = document.createElement("ol");
    for (const [k, probability] of top.length ? top : [[predicted, confidence]]) {
      const line = element("li", data.names[k]);
      line.title = data.names[k];
      line.prepend(element("b", percent(probability)));
      classes.append(line);
    }
    const lines = [["true", truth], ["predicted", predicted]].map(([label, k]) => {
      const line = element("p", `${label}: ${data.names[k]}`);
      line.title = data.names[k];
      return line;
    });
    item.append(pictures, ...lines, classes, element("small", name));
    return item;
  }

  const mostConfident = document.getElementById("mistakes");
  if (mostConfident) {
    mostConfident.append(...data.mistakes.slice(0, mostConfident.dataset.count).map(card));
  }

  function show(button) {
    const { truth, predicted, count, text } = describe(button);
    const mistakes = data.mistakes.filter((m) => m[0] === truth && m[1] === predicted);
    mistakes.sort((a, b) => b[3] - a[3]);
    const list = document.createElement("ul");
    list.className = "cards";
    list.append(...mistakes.map(card));
    const heading = element("h3", text);
    const summary = mistakes.length
      ? `${mistakes.length} of ${count} images, sorted by decreasing confidence.`
      : `The run saved no images of this cell.`;
    panel.replaceChildren(heading, element("p", summary));
    status.textContent = `${text}. ${summary}`;
    if (mistakes.length) panel.append(list);
    for (const other of buttons) {
      other.setAttribute("aria-pressed", String(other.dataset.cell === button.dataset.cell));
    }
    panel.scrollIntoView({ block: "nearest" });
  }

  for (const button of buttons) {
    button.addEventListener("click", () => show(button));
  }

  if (matrix) {
    // The Tab key stops once in the matrix; the arrow keys move to the next cell that has a button.
    const cells = [...matrix.querySelectorAll("button")];
    cells.forEach((button, k) => (button.tabIndex = k ? -1 : 0));
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
      cells.forEach((button) => (button.tabIndex = button === target ? 0 : -1));
      target.ariaLabel = describe(target).text;
    });
    matrix.addEventListener("pointerover", ({ target }) => {
      if (target.dataset.cell) target.title = describe(target).text;
    });
  }
}
