/** Server-sent events of a response, as OpenAI's API sends them. */

const END = "[DONE]";

/**
 * Read a stream of events to its end.
 * @param {ReadableStream<Uint8Array>} stream
 * @param {(data: string) => void} onData Called with the data of each event except the last.
 * @param {(comment: string) => void} onComment Called with each comment.
 * @throws {Error} The stream ends before its last event.
 */
export async function readEvents(stream, onData, onComment) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new Error("the stream ended before its last event");
      buffer = (buffer + value).replaceAll("\r\n", "\n");
      const events = buffer.split("\n\n");
      buffer = events.pop();
      for (const event of events) {
        const data = dataOf(event);
        if (data === END) return;
        if (data) onData(data);
        else if (event.startsWith(":")) onComment(event.slice(1).trim());
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

/** Return the data of an event; "" for a comment, which only keeps the connection open. */
function dataOf(event) {
  const lines = [];
  for (const line of event.split("\n")) {
    if (line.startsWith("data:")) lines.push(line.slice(5).trimStart());
  }
  return lines.join("\n");
}
