// Making and changing elements. Text is always set as text, never parsed as HTML.

export const byId = (id) => document.getElementById(id);

/** An element: el("p", {class: "note"}, "text", child …). Properties that are undefined or null are left out. */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Set text if it differs, so that selections and screen readers are left in peace. */
export function setText(element, text) {
  const wanted = String(text);
  if (element.textContent !== wanted) element.textContent = wanted;
}

export function setAttribute(element, name, value) {
  if (value === null || value === undefined || value === false) {
    if (element.hasAttribute(name)) element.removeAttribute(name);
  } else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

/**
 * Make the children of *parent* those of *items*, keeping what is there by key.
 * make(item) gives a new element, update(element, item) brings it up to date.
 */
export function keyed(parent, items, key, make, update) {
  const before = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let place = parent.firstElementChild;
  for (const item of items) {
    const name = String(key(item));
    let child = before.get(name);
    if (child === undefined) {
      child = make(item);
      child.dataset.key = name;
    }
    before.delete(name);
    update(child, item);
    if (child === place) place = place.nextElementSibling;
    else parent.insertBefore(child, place);
  }
  for (const child of before.values()) child.remove();
}

/**
 * A table whose rows are kept by key.
 * columns: {title, text(item) → string | fill(cell, item), number: bool, class, about(item) → tooltip, hint: of the heading}.
 */
export class Table {
  constructor(parent, caption, columns, { key, empty, level = () => null }) {
    this.columns = columns;
    this.key = key;
    this.level = level;
    // The roles are those that the elements have; on a phone, where rows are no table to the eye, they stay one to others.
    this.body = el("tbody", { role: "rowgroup" });
    const headings = columns.map((column) => el("th", { scope: "col", role: "columnheader", class: classes(column), title: column.hint }, column.title));
    const head = el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, ...headings));
    this.table = el("table", { role: "table" }, el("caption", { class: "unseen" }, caption), head, this.body);
    // Focusable, so that the keyboard can scroll it too where it is wider than the screen.
    this.scroller = el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Table: ${caption}` }, this.table);
    this.empty = el("p", { class: "nothing" }, empty);
    parent.append(this.scroller, this.empty);
    this.update([]);
  }

  update(items, empty = null) {
    if (empty !== null) setText(this.empty, empty);
    this.scroller.hidden = items.length === 0;
    this.empty.hidden = items.length > 0;
    keyed(
      this.body,
      items,
      this.key,
      () => el("tr", { role: "row" }, ...this.columns.map((column) => el("td", { role: "cell", class: classes(column), "data-title": column.title }))),
      (row, item) => {
        setAttribute(row, "data-level", this.level(item));
        this.columns.forEach((column, index) => {
          const cell = row.children[index];
          if (column.fill) column.fill(cell, item);
          else setText(cell, column.text(item));
          if (column.about) setAttribute(cell, "title", column.about(item));
        });
      },
    );
  }
}

function classes(column) {
  return [column.number ? "number" : null, column.class].filter(Boolean).join(" ") || null;
}

/** Bring a part of the page into view, and put the keyboard there. */
export function goTo(id) {
  const target = byId(id);
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  target.scrollIntoView({ behavior: calm ? "auto" : "smooth", block: "start" });
  target.focus({ preventScroll: true });
}

/** One of several buttons that exclude each other is on. */
export function choose(group, name, value) {
  for (const button of group.querySelectorAll("button")) {
    setAttribute(button, "aria-pressed", button.dataset[name] === String(value) ? "true" : "false");
  }
}

/** What was remembered in this browser; null if nothing, or if there is no storage. */
export function recall(name) {
  try {
    return localStorage.getItem(`raypg-${name}`);
  } catch {
    return null;
  }
}

export function remember(name, value) {
  try {
    localStorage.setItem(`raypg-${name}`, value);
  } catch {
    // Nothing is remembered, then.
  }
}
