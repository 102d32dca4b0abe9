// Ask the server, with the API key if there is one.

const KEY = "cappy-api-key"; // in sessionStorage: this tab, until it is closed

export const hasKey = () => sessionStorage.getItem(KEY) !== null;
export const keepKey = (key) => sessionStorage.setItem(KEY, key);

/** Ask the server. Gives its status, headers and JSON (null if it sent none), and the round trip in milliseconds. */
export async function call(path, options = {}) {
  const headers = { accept: "application/json", ...options.headers };
  if (hasKey()) headers.authorization = `Bearer ${sessionStorage.getItem(KEY)}`;
  const start = performance.now();
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  const text = await response.text();
  const ms = performance.now() - start;
  const body = parsed(text);
  return { ok: response.ok && body !== null, status: response.status, headers: response.headers, body, ms };
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null; // a proxy's page, perhaps
  }
}

/** Say in words what a refusal means, and keep what the server says itself. `pair` counts from 0. */
export function explain(reply) {
  const said = reply.body?.message ?? reply.body?.error;
  const titles = {
    401: hasKey() ? "The server does not accept this API key." : "The server asks for an API key.",
    404: "The server does not know this address.",
    413: "This is more than the server accepts at once.",
    422: "The server cannot rank this.",
    429: `The server has too much to do. ${whenToRetry(reply.headers)}`,
    500: "The model failed.",
    503: `The server cannot answer now. ${whenToRetry(reply.headers)}`,
  };
  return {
    title: titles[reply.status] ?? `The server answered with status ${reply.status}.`,
    details: typeof said === "string" ? said : "The answer is not JSON. Something between this page and the server may have sent it.",
    pair: reply.body?.pair ?? null,
  };
}

/** Say when to try again, from the header Retry-After: seconds or a date. */
function whenToRetry(headers) {
  const after = headers.get("retry-after");
  if (after === null) return "Try again in a moment.";
  const seconds = /^\d+$/.test(after) ? Number(after) : Math.ceil((Date.parse(after) - Date.now()) / 1000);
  return seconds > 0 ? `Try again in ${seconds} second${seconds === 1 ? "" : "s"}.` : "Try again now.";
}
