//! The last norm, the head and the loss, some rows at a time.

use trine_format::names::TensorId;

use super::adapters::Plain;
use super::forward::Norm;
use super::{Address, Kind, Pass, Product, launch, row_block};
use crate::error::Result;
use crate::layout::{self, Id, bytes};

/// Bytes of the logits that exist at a time.
const LOGITS: usize = 1 << 30;

/// Bytes of a row of logits that is kept in shared memory; of two such rows at a time.
const CACHED_ROW: usize = 112 << 10;

impl Pass<'_> {
    /// The parameter that is the head.
    fn head(&self) -> Id {
        Id::Of(layout::head(self.config))
    }

    /// From one row of logits to the next: 16 bytes are read at once.
    fn logits_stride(&self) -> usize {
        self.config.vocab_size.next_multiple_of(8)
    }

    /// Rows of logits that exist at a time.
    fn rows_at_a_time(&self) -> usize {
        let row = bytes(self.logits_stride(), self.kind());
        (LOGITS / row / 128 * 128).max(128).min(self.input.learned)
    }

    /// The last norm, of the rows that predict something.
    fn normed(&self) -> Result<()> {
        let layers = self.config.num_hidden_layers;
        self.norm(&Norm {
            x: self.memory.state(layers - 1).middle.at(),
            kind: Kind::F32,
            pending: self.pending(layers),
            rows: self.input.rows,
            weight: self.master(TensorId::FinalNorm),
            out: Some(self.memory.hidden.at()),
            narrow: None,
            plain: Plain::default(),
            scales: None,
            rms: self.memory.hidden_rms.at(),
            shape: (self.input.learned, self.config.hidden_size),
        })
    }

    /// Logits of rows from `first` on; their losses; and, with a weight, their gradients in their place.
    fn logits(&mut self, first: usize, rows: usize, weight: f32) -> Result<()> {
        let (kind, width, vocab) = (self.kind(), self.config.hidden_size, self.config.vocab_size);
        let stride = self.logits_stride();
        let logits = self.memory.logits.at();
        let product = |ids| Product {
            b_transposed: true,
            ..Product::new(kind, [rows, ids, width], [width, width, stride])
        };
        let hidden = self.memory.hidden.at() + bytes(first * width, kind) as u64;
        for part in self.head_parts()? {
            let to = logits + bytes(part.0, kind) as u64;
            self.device.multiply(&product(part.1), hidden, self.head_weights(part)?, to)?;
        }
        let kernel = format!("cross_entropy_{}", kind.name());
        let at = 4 * first as u64;
        let (targets, losses) = (self.ids.targets.at() + at, self.memory.losses.at() + at);
        // In a pass that is for its losses only, there is a gradient's memory for them.
        let margins = (weight == 0.0).then(|| self.memory.delta.at() + at);
        let threads = if vocab < 4096 { 128 } else { 512 };
        // Where a row fits, it is read once.
        let row = bytes(stride, kind);
        let cached = row <= CACHED_ROW.min(self.device.shared_memory());
        launch!(self.device, &kernel, [rows, 1, 1], threads, if cached { row } else { 0 };
            logits, targets, weight, losses, margins, vocab, stride, cached)
    }

    /// The ids of the head, as many at a time as are at hand: the first, and their number.
    fn head_parts(&mut self) -> Result<Vec<(usize, usize)>> {
        let (ids, all) = (self.head_ids()?, self.config.vocab_size);
        Ok((0..all).step_by(ids).map(|first| (first, ids.min(all - first))).collect())
    }

    /// The head's weights of some ids, as they are multiplied.
    fn head_weights(&self, part: (usize, usize)) -> Result<Address> {
        if let Some(base) = self.base.as_deref() {
            return self.frozen_head(base, part);
        }
        let tensor = self.layout.get(self.head()).and_then(|tensor| tensor.copy);
        let at = tensor.expect("the head is multiplied") * self.kind().bytes() as u64;
        Ok(self.multiplied + at)
    }

    fn chunks(&mut self) -> Result<Vec<(usize, usize)>> {
        let (rows, all) = (self.rows_at_a_time(), self.input.learned);
        self.memory.logits.reserve(bytes(rows * self.logits_stride(), self.memory.kind))?;
        Ok((0..all).step_by(rows).map(|first| (first, rows.min(all - first))).collect())
    }

    fn add_losses(&self) -> Result<()> {
        launch!(self.device, "add_sum", [1, 1, 1], 1024, 0;
            self.memory.losses.at(), self.input.learned, self.loss)
    }

    /// Adds the losses of all rows that predict something.
    pub(super) fn losses(&mut self) -> Result<()> {
        self.normed()?;
        for (first, rows) in self.chunks()? {
            self.logits(first, rows, 0.0)?;
        }
        self.add_losses()
    }

    /// As [`Self::losses`], with the gradients of the head, of the last norm, and of the residual stream.
    pub(super) fn head_backward(&mut self, weight: f32) -> Result<()> {
        self.normed()?;
        let (kind, width, vocab) = (self.kind(), self.config.hidden_size, self.config.vocab_size);
        let stride = self.logits_stride();
        let gradient = self.gradient(self.head());
        for (first, rows) in self.chunks()? {
            self.logits(first, rows, weight)?;
            let offset = bytes(first * width, kind) as u64;
            let (hidden, dhidden) =
                (self.memory.hidden.at() + offset, self.memory.dhidden.at() + offset);
            let logits = self.memory.logits.at();
            let of_rows = |ids| Product::new(kind, [rows, width, ids], [stride, width, width]);
            for part in self.head_parts()? {
                let from = logits + bytes(part.0, kind) as u64;
                let product = Product { add: part.0 > 0, ..of_rows(part.1) };
                self.device.multiply(&product, from, self.head_weights(part)?, dhidden)?;
            }
            let Some(gradient) = gradient else { continue };
            let of_head = Product {
                m: vocab,
                n: width,
                k: rows,
                a_transposed: true,
                result: Kind::F32,
                add: self.add || first > 0,
                ..of_rows(rows)
            };
            self.device.multiply(&of_head, logits, hidden, gradient)?;
        }
        self.add_losses()
    }

    /// Blocks of a kernel that goes through rows, each block through several: `threads` on a multiprocessor.
    pub(super) fn row_blocks(&self, rows: usize, width: usize, threads: usize) -> usize {
        rows.min(self.device.processors() * (threads / row_block(width).0).max(1))
    }
}
