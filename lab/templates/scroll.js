"use strict";
// Show a hint in each box whose content is wider than the box.
for (const box of document.querySelectorAll(".scroll")) {
  const hint = document.createElement("p");
  hint.className = "hint";
  hint.textContent = "Scroll sideways \u2192";
  hint.hidden = true;
  hint.ariaHidden = "true"; // the label of the box says so, too
  box.prepend(hint);
  const update = () => (hint.hidden = box.scrollWidth <= box.clientWidth);
  const observer = new ResizeObserver(update);
  [box, ...box.children].forEach((element) => observer.observe(element));
}
