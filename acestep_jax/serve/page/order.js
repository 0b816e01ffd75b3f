// The order of records in the history, and which of them are gone. No DOM here.

/** Return the oldest record; null if there is none. */
export function oldest(records) {
  return records.reduce((found, record) => (found && found.created <= record.created ? found : record), null);
}

/** Return the record that follows another one, newest first: the newest of the older ones, or null. */
export function follower(record, records) {
  const older = records.filter((other) => other.created < record.created);
  return older.reduce((found, other) => (found && found.created >= other.created ? found : other), null);
}

/**
 * Return the ids of records that the server has removed.
 *
 * `asked` are the records that were known when the newest `limit` were requested, `songs` is the response. Records that
 * became known in between are not in it, but are not gone.
 */
export function vanished(asked, songs, limit) {
  const known = new Set(songs.map((record) => record.id));
  const since = songs.length < limit ? -Infinity : Math.min(...songs.map((record) => record.created));
  return asked.filter((record) => record.created >= since && !known.has(record.id)).map((record) => record.id);
}
