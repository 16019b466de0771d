"use strict";
// What is wider than its box says so, as long as it is.
for (const box of document.querySelectorAll(".scroll")) {
  const hint = document.createElement("p");
  hint.className = "hint";
  hint.textContent = "Scrolls sideways \u2192";
  hint.hidden = true;
  hint.ariaHidden = "true"; // the box's label says it, too
  box.prepend(hint);
  const look = () => (hint.hidden = box.scrollWidth <= box.clientWidth);
  const observer = new ResizeObserver(look);
  [box, ...box.children].forEach((element) => observer.observe(element));
}
