// Make elements of the document. Texts are put in as text, never as HTML.

export const find = (id) => document.getElementById(id);

/** Make an element of a class, with texts or other elements in it. */
export function make(tag, className, ...content) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...content);
  return element;
}
