// Which records of the history come where, and which are gone. No DOM here.

/** Return the record that the oldest songs have; null of none. */
export function oldest(records) {
  return records.reduce((found, record) => (found && found.created <= record.created ? found : record), null);
}

/** Return which of some records comes next after one, the newest first: the newest of those that are older; or null. */
export function follower(record, records) {
  const older = records.filter((other) => other.created < record.created);
  return older.reduce((found, other) => (found && found.created >= other.created ? found : other), null);
}

/**
 * Return the ids of records that the server has no more.
 *
 * `asked` are those that were known when the newest `limit` were asked for, `songs` the answer: what became known
 * meanwhile is not in it, and is there all the same.
 */
export function vanished(asked, songs, limit) {
  const known = new Set(songs.map((record) => record.id));
  const since = songs.length < limit ? -Infinity : Math.min(...songs.map((record) => record.created));
  return asked.filter((record) => record.created >= since && !known.has(record.id)).map((record) => record.id);
}
