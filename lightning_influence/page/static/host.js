// Where the documents come from: TensorBoard, the server of `lightning-influence view`, or the file itself.

/**
 * @typedef {object} Run
 * @property {string} id
 * @property {string} name
 * @property {string} status
 * @property {string} created
 * @property {string | null} [error]
 * @property {number | null} [epochs_done]
 */

/** @typedef {{ text: string, tag: string }} Kept A review, and what tells it apart. */

/**
 * @typedef {object} Host
 * @property {boolean} keepsReviews Whether decisions are written beside the audit.
 * @property {boolean} changes Whether new runs can come in.
 * @property {() => Promise<Run[]>} runs
 * @property {(id: string) => Promise<any>} audit
 * @property {(id: string, chunk: number) => Promise<string[]>} pictures
 * @property {(id: string) => Promise<Kept>} review What is kept beside the audit.
 * @property {(id: string, csv: string, tag: string) => Promise<string>} keepReview Writes if what is there has the tag,
 *   and returns the new one.
 */

/**
 * Choose by what is there.
 * @returns {Host}
 */
export function chooseHost() {
  if (document.getElementById('influence-runs')) return embedded();
  const token = new URLSearchParams(location.search).get('token');
  // TensorBoard's frame has a `name`, and no reviews are kept there.
  const inTensorBoard = new URLSearchParams(location.search).has('name');
  return served(token ?? '', !inTensorBoard);
}

/**
 * @param {string} token
 * @param {boolean} keepsReviews
 * @returns {Host}
 */
function served(token, keepsReviews) {
  /** @type {Record<string, string>} */
  const headers = keepsReviews ? { 'X-Influence-Token': token } : {};
  /**
   * @param {string} address
   * @param {RequestInit} [more]
   */
  async function ask(address, more = {}) {
    /** @type {Response} */
    let answer;
    try {
      answer = await fetch(address, { headers, credentials: 'same-origin', ...more });
    } catch {
      throw new Error('the server does not answer; is it still running?');
    }
    if (!answer.ok) throw new Error(await reason(answer));
    return answer;
  }
  const tagOf = (/** @type {Response} */ answer) => answer.headers.get('ETag') ?? '';
  const query = (/** @type {string} */ id) => `id=${encodeURIComponent(id)}`;
  return {
    keepsReviews,
    changes: true,
    runs: async () => (await ask('./runs')).json(),
    audit: async (id) => (await ask(`./audit?${query(id)}`)).json(),
    pictures: async (id, chunk) => (await ask(`./pictures?${query(id)}&chunk=${chunk}`)).json(),
    review: async (id) => {
      if (!keepsReviews) return { text: '', tag: '' };
      const answer = await ask(`./review?${query(id)}`);
      return { text: await answer.text(), tag: tagOf(answer) };
    },
    keepReview: async (id, csv, tag) => {
      const small = csv.length < 60000; // of what the browser still sends when the page goes
      const more = { method: 'POST', body: csv, keepalive: small, headers: { ...headers, 'If-Match': tag } };
      return tagOf(await ask(`./review?${query(id)}`, more));
    },
  };
}

/** @param {Response} answer */
async function reason(answer) {
  const text = await answer.text();
  try {
    return String(JSON.parse(text).error);
  } catch {
    return `the server answered ${answer.status} ${answer.statusText}`;
  }
}

/** @returns {Host} */
function embedded() {
  const read = (/** @type {string} */ key) => {
    const found = document.getElementById(key);
    if (!found) throw new Error('the file does not hold it');
    return JSON.parse(found.textContent ?? '');
  };
  return {
    keepsReviews: false,
    changes: false,
    runs: async () => read('influence-runs'),
    audit: async (id) => read(`influence-audit-${id}`),
    pictures: async (id, chunk) => read(`influence-pictures-${id}-${chunk}`),
    review: async () => ({ text: '', tag: '' }),
    keepReview: async () => '',
  };
}
