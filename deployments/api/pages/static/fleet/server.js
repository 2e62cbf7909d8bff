/* What the page asks of its server. Every path is relative, since a server may be behind a prefix. */

/** The headers of each request: the API key that was set in the chat page, if any. */
export function headers() {
  const key = sessionStorage.getItem("rayline.key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** The JSON at a path. Throws an Error that says why there is none. */
export async function get(path) {
  const response = await fetch(path, { headers: headers() });
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(body.error?.message ?? `the server answered ${response.status}`);
  return body;
}
