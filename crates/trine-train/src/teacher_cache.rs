//! What a teacher said, in a file: of every sequence that it was asked about, the likeliest ids of each token.
//!
//! ```text
//! magic  "trinesay"              8 bytes
//! version, ids of a token, vocabulary    u32 each, little-endian as all numbers
//! temperature                    f32
//! BLAKE3 of the teacher's weights        32 bytes
//! records, each:
//!   key                          16 bytes: BLAKE3 of the sequence: its length, inputs, targets, and where documents start
//!   tokens                       u32
//!   for each token:
//!     ids                        u16 or, of more than 65536, u32 each
//!     probabilities, that of all others last     u16 each: -2048 ln p
//!   check                        8 bytes: BLAKE3 of the record so far
//! ```
//!
//! A record is found by what its sequence is, not by where in a run it comes: another epoch, another run,
//! another order find it. Records are added at the end, under a lock, so runs may share a file; one that was
//! cut off, or that the disk has lost, is made anew.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use trine_data::Batch;

use crate::TrainError;
use crate::fused::Likeliest;

const MAGIC: &[u8; 8] = b"trinesay";
const VERSION: u32 = 1;
const HEADER: u64 = 8 + 3 * 4 + 4 + 32;

/// Bytes of a record besides its tokens.
const KEY: usize = 16;
const COUNT: usize = 4;
const CHECK: usize = 8;

/// Steps of a logarithm: probabilities are exact to 1 / 4096.
const STEPS: f32 = 2048.0;

/// Which sequence a record is of.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Key([u8; KEY]);

impl Key {
    /// Of a batch of one sequence.
    pub(crate) fn of(sequence: &Batch) -> Self {
        let tokens = sequence.inputs.iter().chain(&sequence.targets);
        let all = tokens.chain(sequence.starts.iter().flatten());
        let mut bytes = sequence.seq_len.to_le_bytes().to_vec();
        bytes.extend(all.flat_map(|number| number.to_le_bytes()));
        Self(first(&blake3::hash(&bytes)))
    }
}

fn first<const N: usize>(hash: &blake3::Hash) -> [u8; N] {
    std::array::from_fn(|i| hash.as_bytes()[i])
}

/// Whose words a file holds.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Source {
    /// Ids of a token.
    pub(crate) count: usize,
    pub(crate) vocab: usize,
    pub(crate) temperature: f32,
    /// BLAKE3 of its weights.
    pub(crate) teacher: blake3::Hash,
}

/// A file of what a teacher said.
pub(crate) struct TeacherCache {
    path: PathBuf,
    file: File,
    source: Source,
    /// Where records begin.
    records: HashMap<Key, u64>,
    /// The end of the last record that is known.
    end: u64,
}

impl TeacherCache {
    /// Opens the file at `path`, or begins one.
    ///
    /// # Errors
    /// A file that is none, that holds the words of another teacher, or that the disk refuses.
    pub(crate) fn open(path: &Path, source: Source) -> Result<Self, TrainError> {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let file = file.map_err(write_error(path))?;
        let mut cache =
            Self { path: path.to_owned(), file, source, records: HashMap::new(), end: HEADER };
        cache.locked(|cache| {
            let header = cache.source.header();
            if cache.len()? == 0 {
                return cache.append(0, &header);
            }
            let mut found = vec![0; header.len()];
            let read = cache.at(0).and_then(|file| file.read_exact(&mut found));
            let message = match read {
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                    "is no file of a teacher".to_owned()
                }
                Err(e) => return Err(cache.read_error(e)),
                Ok(()) if found == header => return cache.scan(),
                Ok(()) => match Source::parse(&found) {
                    Some(found) => cache.source.differences(&found),
                    None => "is no file of a teacher".to_owned(),
                },
            };
            Err(TrainError::Checkpoint { path: cache.path.clone(), message })
        })?;
        Ok(cache)
    }

    /// Ids of a token.
    pub(crate) fn count(&self) -> usize {
        self.source.count
    }

    /// What was said of a sequence of which so many tokens are to be predicted, if it is known.
    ///
    /// # Errors
    /// A disk that refuses.
    pub(crate) fn read(&mut self, key: Key, rows: usize) -> Result<Option<Likeliest>, TrainError> {
        let Some(at) = self.records.get(&key).copied() else { return Ok(None) };
        let mut record = vec![0; self.source.record(rows)];
        let read = self.at(at).and_then(|file| file.read_exact(&mut record));
        match read {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {}
            Err(e) => return Err(self.read_error(e)),
            Ok(()) => {
                let said = self.source.decode(key, rows, &record);
                if said.is_some() {
                    return Ok(said);
                }
            }
        }
        // Lost; it will be said again.
        self.records.remove(&key);
        Ok(None)
    }

    /// Adds what was said of a sequence, and returns it as it will be read.
    ///
    /// # Errors
    /// A disk that refuses.
    pub(crate) fn write(&mut self, key: Key, said: &Likeliest) -> Result<Likeliest, TrainError> {
        let record = self.source.encode(key, said);
        self.locked(|cache| {
            // Others may have written meanwhile.
            cache.scan()?;
            let at = cache.end;
            cache.append(at, &record)?;
            cache.records.insert(key, at);
            Ok(())
        })?;
        let said = self.source.decode(key, said.rows(), &record);
        Ok(said.expect("a record that was just encoded"))
    }

    /// Finds the records after those that are known; what was cut off at the end is left out.
    fn scan(&mut self) -> Result<(), TrainError> {
        let len = self.len()?;
        loop {
            let mut head = [0; KEY + COUNT];
            let mut end = self.end + head.len() as u64;
            if end > len {
                return Ok(());
            }
            let read = self.at(self.end).and_then(|file| file.read_exact(&mut head));
            read.map_err(|e| self.read_error(e))?;
            let rows = u32::from_le_bytes(std::array::from_fn(|i| head[KEY + i])) as usize;
            end += (self.source.record(rows) - head.len()) as u64;
            if end > len {
                return Ok(());
            }
            self.records.insert(Key(std::array::from_fn(|i| head[i])), self.end);
            self.end = end;
        }
    }

    /// Writes at `at`, and cuts the file off behind.
    fn append(&mut self, at: u64, bytes: &[u8]) -> Result<(), TrainError> {
        let write = self.file.set_len(at).and_then(|()| self.at(at)?.write_all(bytes));
        write.map_err(write_error(&self.path))?;
        self.end = at + bytes.len() as u64;
        Ok(())
    }

    /// Does something while no other run writes.
    fn locked<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T, TrainError>,
    ) -> Result<T, TrainError> {
        self.file.lock().map_err(write_error(&self.path))?;
        let done = work(self);
        self.file.unlock().map_err(write_error(&self.path))?;
        done
    }

    fn at(&mut self, at: u64) -> io::Result<&mut File> {
        self.file.seek(SeekFrom::Start(at))?;
        Ok(&mut self.file)
    }

    fn len(&self) -> Result<u64, TrainError> {
        self.file.metadata().map(|about| about.len()).map_err(|e| self.read_error(e))
    }

    fn read_error(&self, source: io::Error) -> TrainError {
        TrainError::Read { path: self.path.clone(), source }
    }
}

fn write_error(path: &Path) -> impl FnOnce(io::Error) -> TrainError + use<> {
    let path = path.to_owned();
    move |source| TrainError::Write { path, source }
}

impl Source {
    /// Bytes of a token in a file.
    pub(crate) fn token(&self) -> usize {
        self.count * (self.id() + 2) + 2
    }

    fn id(&self) -> usize {
        if self.vocab <= 1 << 16 { 2 } else { 4 }
    }

    fn record(&self, rows: usize) -> usize {
        KEY + COUNT + rows * self.token() + CHECK
    }

    fn header(&self) -> Vec<u8> {
        let mut header = MAGIC.to_vec();
        for number in [VERSION, self.count as u32, self.vocab as u32] {
            header.extend(number.to_le_bytes());
        }
        header.extend(self.temperature.to_le_bytes());
        header.extend(self.teacher.as_bytes());
        header
    }

    fn parse(header: &[u8]) -> Option<Self> {
        let rest = header.strip_prefix(MAGIC)?;
        let number =
            |i: usize| Some(u32::from_le_bytes(rest.get(4 * i..4 * i + 4)?.try_into().ok()?));
        let known = number(0)? == VERSION;
        let teacher = blake3::Hash::from_bytes(rest.get(16..48)?.try_into().ok()?);
        known.then_some(Self {
            count: number(1)? as usize,
            vocab: number(2)? as usize,
            temperature: f32::from_bits(number(3)?),
            teacher,
        })
    }

    /// Where a file that was `found` is another one's.
    fn differences(&self, found: &Self) -> String {
        let mut differing = Vec::new();
        for (what, expected, found) in [
            ("finetune.distill.top_k", self.count.to_string(), found.count.to_string()),
            ("ids of the vocabulary", self.vocab.to_string(), found.vocab.to_string()),
            (
                "finetune.distill.temperature",
                self.temperature.to_string(),
                found.temperature.to_string(),
            ),
            ("BLAKE3 of the teacher", self.teacher.to_string(), found.teacher.to_string()),
        ] {
            if expected != found {
                differing.push(format!("{what}: expected {expected}, found {found}"));
            }
        }
        format!(
            "holds what another teacher said ({}): name another file as finetune.distill.cache",
            differing.join("; ")
        )
    }

    fn encode(&self, key: Key, said: &Likeliest) -> Vec<u8> {
        let mut record = Vec::with_capacity(self.record(said.rows()));
        record.extend(key.0);
        record.extend((said.rows() as u32).to_le_bytes());
        let code = |p: f32| ((-STEPS * p.ln()).round() as u16).to_le_bytes();
        let rows =
            said.ids.chunks_exact(self.count).zip(said.probabilities.chunks_exact(self.count));
        for ((ids, probabilities), rest) in rows.zip(&said.rest) {
            for id in ids {
                record.extend(&id.to_le_bytes()[..self.id()]);
            }
            probabilities.iter().for_each(|p| record.extend(code(*p)));
            record.extend(code(*rest));
        }
        let check: [u8; CHECK] = first(&blake3::hash(&record));
        record.extend(check);
        record
    }

    /// What a record says, if it is whole and of this sequence.
    fn decode(&self, key: Key, rows: usize, record: &[u8]) -> Option<Likeliest> {
        let (content, check) = record.split_at_checked(record.len().checked_sub(CHECK)?)?;
        let (head, tokens) = content.split_at_checked(KEY + COUNT)?;
        let whole = first::<CHECK>(&blake3::hash(content)) == check;
        let of_sequence = head[..KEY] == key.0 && head[KEY..] == (rows as u32).to_le_bytes();
        if !whole || !of_sequence || tokens.len() != rows * self.token() {
            return None;
        }
        let mut said = Likeliest::new(self.count);
        for token in tokens.chunks_exact(self.token()) {
            let (ids, codes) = token.split_at(self.count * self.id());
            for id in ids.chunks_exact(self.id()) {
                let id =
                    u32::from_le_bytes(std::array::from_fn(|i| id.get(i).copied().unwrap_or(0)));
                if id as usize >= self.vocab {
                    return None;
                }
                said.ids.push(id);
            }
            // The largest number stands for what is as good as nothing.
            let p = |code: &[u8]| match u16::from_le_bytes([code[0], code[1]]) {
                u16::MAX => 0.0,
                code => (-f32::from(code) / STEPS).exp(),
            };
            let mut shares: Vec<f32> = codes.chunks_exact(2).map(p).collect();
            let sum: f32 = shares.iter().sum();
            shares.iter_mut().for_each(|share| *share /= sum);
            said.rest.extend(shares.pop());
            said.probabilities.extend(shares);
        }
        Some(said)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source() -> Source {
        let teacher = blake3::hash(b"teacher");
        Source { count: 2, vocab: 70_000, temperature: 2.0, teacher }
    }

    fn key(of: u32) -> Key {
        let ids = |from: u32| (from..from + 3).collect();
        let (inputs, targets) = (ids(of), ids(of + 1));
        Key::of(&Batch { inputs, targets, starts: None, batch: 1, seq_len: 3 })
    }

    fn said(rows: usize) -> Likeliest {
        let mut said = Likeliest::new(2);
        for row in 0..rows {
            said.ids.extend([69_999 - row as u32, row as u32]);
            said.probabilities.extend([0.7, 0.3 / (row + 2) as f32]);
            said.rest.push(1.0 - 0.7 - 0.3 / (row + 2) as f32);
        }
        said
    }

    fn near(a: &[f32], b: &[f32]) -> bool {
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 4e-4)
    }

    #[test]
    fn what_was_said_is_found_by_every_run_that_shares_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("said");
        let mut one = TeacherCache::open(&path, source()).unwrap();
        let mut other = TeacherCache::open(&path, source()).unwrap();
        let written = one.write(key(1), &said(3)).unwrap();
        other.write(key(2), &said(1)).unwrap();
        one.write(key(3), &said(2)).unwrap();
        assert_eq!(written.ids, said(3).ids);
        assert!(near(&written.probabilities, &said(3).probabilities));
        assert!(near(&written.rest, &said(3).rest));
        let mut again = TeacherCache::open(&path, source()).unwrap();
        assert_eq!(again.read(key(1), 3).unwrap(), Some(written));
        assert!(again.read(key(2), 1).unwrap().is_some());
        assert!(again.read(key(3), 2).unwrap().is_some());
        assert!(again.read(key(4), 2).unwrap().is_none());
        assert!(again.read(key(3), 1).unwrap().is_none(), "another number of tokens");
    }

    #[test]
    fn what_is_cut_off_or_lost_is_said_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("said");
        let mut cache = TeacherCache::open(&path, source()).unwrap();
        cache.write(key(1), &said(3)).unwrap();
        let written = cache.write(key(2), &said(3)).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for len in HEADER as usize..whole.len() {
            std::fs::write(&path, &whole[..len]).unwrap();
            let mut cache = TeacherCache::open(&path, source()).unwrap();
            assert!(cache.read(key(2), 3).unwrap().is_none(), "{len} bytes");
            cache.write(key(2), &said(3)).unwrap();
            let mut again = TeacherCache::open(&path, source()).unwrap();
            assert_eq!(again.read(key(2), 3).unwrap().as_ref(), Some(&written), "{len} bytes");
        }
        for at in HEADER as usize..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x40;
            std::fs::write(&path, &bytes).unwrap();
            let mut cache = TeacherCache::open(&path, source()).unwrap();
            let known = [key(1), key(2)].map(|key| cache.read(key, 3).unwrap().is_some());
            assert_ne!(known, [true; 2], "byte {at}");
        }
    }

    #[test]
    fn words_of_another_teacher_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("said");
        drop(TeacherCache::open(&path, source()).unwrap());
        let error = |source: Source| match TeacherCache::open(&path, source) {
            Ok(_) => panic!("opened"),
            Err(e) => e.to_string(),
        };
        let found = error(Source { count: 3, ..source() });
        assert!(found.contains("finetune.distill.top_k: expected 3, found 2"), "{found}");
        let found = error(Source { teacher: blake3::hash(b"other"), ..source() });
        assert!(found.contains("BLAKE3 of the teacher"), "{found}");
        for content in [&b"something else"[..], &[7; 100]] {
            std::fs::write(&path, content).unwrap();
            assert!(error(source()).contains("is no file of a teacher"));
        }
    }
}
