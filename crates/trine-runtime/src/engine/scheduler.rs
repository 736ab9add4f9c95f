//! The engine's thread: who is admitted, and what goes through the model next.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use trine_kernels::parallel;

use super::choose::Chooser;
use super::logprobs::Logprob;
use super::prefix::{PrefixCache, common};
use super::stats::{add, set};
use super::{End, Event, Pooling, Request, Shared, Sink, Token, Usage, Waiting};
use crate::adapter::same;
use crate::{Logits, Outputs, Sequence, Step};

/// Ids of prompts in a pass when no text is generated meanwhile; more would use the weights no
/// better.
const ALONE: usize = 128;

/// Ids of a prompt in a pass when logits after each are wanted, which take the vocabulary's size each.
const WITH_LOGITS: usize = 32;

/// Ids that a prompt must have in common with another that is being gone through to wait for it.
const WORTH_WAITING: usize = 64;

pub(super) struct Scheduler {
    shared: Arc<Shared>,
    /// Those with the same adapter follow each other.
    running: Vec<Running>,
    prefixes: PrefixCache,
    /// Of the last pass.
    outputs: Outputs,
}

/// A request that runs.
///
/// The sequence has seen the beginning of the text; ids that it has not seen are what the next passes
/// are given. When it has seen all, an id is chosen, which is then the only one not seen.
struct Running {
    request: Request,
    sink: Sink,
    cancelled: Arc<AtomicBool>,
    sequence: Sequence,
    chooser: Chooser,
    /// The prompt and what was generated.
    text: Vec<u32>,
    /// Ids of the prompt that came from the prefix cache.
    cached: usize,
    /// Log-probabilities of the prompt so far.
    prompt: Vec<Logprob>,
    /// The sum of hidden states of the prompt so far, or the last of them, `(D,)`.
    pooled: Vec<f32>,
    end: Option<End>,
}

impl Scheduler {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        let (prefixes, outputs) = (PrefixCache::default(), Outputs::default());
        Self { shared, running: Vec::new(), prefixes, outputs }
    }

    /// Serves until the engine is closed and nothing is left to do.
    pub(super) fn run(mut self) {
        while self.admit() {
            self.give_up();
            self.pass();
            self.settle();
        }
    }

    /// Waits for something to do and takes what there is room for; `false` when all is done.
    fn admit(&mut self) -> bool {
        let shared = self.shared.clone();
        let mut queue = shared.queue();
        while queue.waiting.is_empty() && self.running.is_empty() {
            if queue.closed {
                return false;
            }
            set(&shared.counters.running, 0);
            queue = shared.changed.wait(queue).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        if queue.aborted {
            self.running.iter_mut().for_each(|running| running.end = Some(End::Aborted));
            for waiting in queue.waiting.drain(..) {
                turn_away(waiting, End::Aborted);
            }
        }
        let now = Instant::now();
        let mut room = true;
        for waiting in self.in_turns(std::mem::take(&mut queue.waiting)) {
            if waiting.cancelled.load(Ordering::Relaxed) {
                add(&shared.counters.cancelled, 1);
            } else if passed(&waiting.request, now) {
                add(&shared.counters.cancelled, 1);
                turn_away(waiting, End::Deadline);
            } else if !room || self.running.len() >= shared.config.max_running {
                queue.waiting.push_back(waiting);
            } else if self.is_being_computed(&waiting.request) {
                // It overtakes nobody: the others behind it may go first.
                queue.waiting.push_back(waiting);
            } else if self.make_room(&waiting.request) {
                self.begin(waiting);
            } else {
                // Those behind it may not take the memory that it waits for.
                room = false;
                queue.waiting.push_back(waiting);
            }
        }
        set(&shared.counters.waiting, queue.waiting.len());
        true
    }

    /// Those that wait in the order in which they are admitted: the first request of every client, then
    /// the second of each, where what runs already counts; those of the same turn as they came.
    fn in_turns(&self, waiting: VecDeque<Waiting>) -> impl Iterator<Item = Waiting> + use<> {
        let mut counts: HashMap<Option<u64>, usize> = HashMap::new();
        for running in &self.running {
            *counts.entry(running.request.client).or_default() += 1;
        }
        let turn = |waiting: Waiting| {
            let count = counts.entry(waiting.request.client).or_default();
            *count += 1;
            (*count, waiting)
        };
        let mut turns: Vec<(usize, Waiting)> = waiting.into_iter().map(turn).collect();
        turns.sort_by_key(|(turn, _)| *turn);
        turns.into_iter().map(|(_, waiting)| waiting)
    }

    /// Whether a prompt that is being gone through, with the same adapter, begins like this one, for
    /// longer than what the prefix cache has.
    fn is_being_computed(&self, request: &Request) -> bool {
        let adapter = request.adapter.as_ref();
        let same = |running: &Running| same(running.request.adapter.as_ref(), adapter);
        let ahead = self.running.iter().filter(|running| running.is_in_prompt() && same(running));
        let common = ahead.map(|running| common(&running.request.prompt, &request.prompt)).max();
        let known = || self.prefixes.longest(&request.prompt, adapter);
        !request.needs_whole_prompt()
            && common.is_some_and(|common| common >= WORTH_WAITING + known())
    }

    /// Whether the memory for a request is there, after prefixes were forgotten where that helps.
    fn make_room(&mut self, request: &Request) -> bool {
        let limit = self.shared.model.config().max_position_embeddings;
        let growth = |running: &Running| running.sequence.growth(running.request.positions(limit));
        let promised: usize = self.running.iter().map(growth).sum();
        // What the prefix cache has of it counts as well, since it may be forgotten.
        let needed = Sequence::new(&self.shared.model).growth(request.positions(limit));
        loop {
            let held = self.kv_bytes();
            if held + promised + needed <= self.shared.config.kv_bytes {
                return true;
            }
            if !self.prefixes.forget_oldest() {
                return false;
            }
        }
    }

    fn kv_bytes(&self) -> usize {
        let running = self.running.iter().map(|running| &running.sequence);
        Sequence::distinct_bytes(running.chain(self.prefixes.sequences()))
    }

    fn begin(&mut self, waiting: Waiting) {
        let Waiting { mut request, mut sink, cancelled } = waiting;
        // The last id needs no position.
        let limit = self.shared.model.config().max_position_embeddings;
        let most = if request.embedding.is_some() { 0 } else { limit + 1 - request.prompt.len() };
        request.max_tokens = request.max_tokens.min(most);
        let Ok(chooser) = Chooser::new(&mut request) else {
            // It was checked when it was taken.
            return sink(Event::End(End::Failed, Usage::default()));
        };
        let found = match request.needs_whole_prompt() {
            true => None,
            false => self.prefixes.find(&request.prompt, request.adapter.as_ref()),
        };
        let adapter = request.adapter.clone();
        let sequence = found.unwrap_or_else(|| Sequence::with_adapter(&self.shared.model, adapter));
        let cached = sequence.positions();
        add(&self.shared.counters.cached_tokens, cached);
        sink(Event::Begin(Usage { prompt: request.prompt.len(), cached, generated: 0 }));
        let text = request.prompt.clone();
        let (prompt, pooled, end) = (Vec::new(), Vec::new(), None);
        let adapter = request.adapter.as_ref();
        let last = self.running.iter().rposition(|r| same(r.request.adapter.as_ref(), adapter));
        let place = last.map_or(self.running.len(), |last| last + 1);
        let running = Running {
            request,
            sink,
            cancelled,
            sequence,
            chooser,
            text,
            cached,
            prompt,
            pooled,
            end,
        };
        self.running.insert(place, running);
    }

    /// Marks what nobody wants any more or what took too long.
    fn give_up(&mut self) {
        let now = Instant::now();
        for running in &mut self.running {
            if running.cancelled.load(Ordering::Relaxed) || passed(&running.request, now) {
                running.end = running.end.or(Some(End::Deadline));
                add(&self.shared.counters.cancelled, 1);
            }
        }
        self.settle();
    }

    /// One pass of the model, and the ids that follow from it.
    fn pass(&mut self) {
        if self.running.is_empty() {
            return;
        }
        let counters = &self.shared.counters;
        let ids = self.ids();
        let mut steps = Vec::with_capacity(ids.len());
        for (running, &count) in self.running.iter_mut().zip(&ids) {
            let seen = running.sequence.positions();
            let logits = match running.text.len() - seen == count {
                _ if running.request.embedding.is_some() => Logits::Hidden,
                _ if running.wants_prompt_logprobs() => Logits::All,
                true => running.chooser.largest().map_or(Logits::Last, Logits::Largest),
                false => Logits::None,
            };
            if running.is_in_prompt() {
                add(&counters.prompt_tokens, count);
            }
            let ids = &running.text[seen..][..count];
            steps.push(Step { sequence: &mut running.sequence, ids, logits });
        }
        let begin = Instant::now();
        let done = self.shared.model.step_into(&mut steps, &mut self.outputs);
        add(&counters.pass_nanoseconds, begin.elapsed().as_nanos() as usize);
        add(&counters.passes, 1);
        if done.is_err() {
            // All that a step can be refused for was checked before.
            self.running.iter_mut().for_each(|running| running.end = Some(End::Failed));
            return;
        }
        let before = self.generated();
        let mut turns: Vec<_> =
            self.running.iter_mut().zip(&ids).zip(self.outputs.iter()).collect();
        let vocab = self.shared.model.config().vocab_size;
        let turn = |((running, count), logits): &mut ((&mut Running, &usize), &[f32])| {
            running.follow(**count, logits, vocab)
        };
        // A choice may take as long as a layer.
        match &mut turns[..] {
            [one] => turn(one),
            many => parallel::for_each(many, |_, one| turn(one)),
        }
        add(&counters.generated_tokens, self.generated() - before);
        for running in &self.running {
            if running.sequence.positions() == running.request.prompt.len() {
                self.prefixes.insert(&running.request.prompt, running.sequence.clone());
            }
        }
    }

    /// Ids generated by all that run.
    fn generated(&self) -> usize {
        self.running.iter().map(|running| running.usage().generated).sum()
    }

    /// How many ids of each request go through the model next: one of each text that is generated,
    /// and equal shares of prompts.
    fn ids(&self) -> Vec<usize> {
        let left = |running: &Running| running.text.len() - running.sequence.positions();
        let pending = |running: &Running| match left(running) {
            many if running.wants_prompt_logprobs() => many.min(WITH_LOGITS),
            many => many,
        };
        let pending: Vec<usize> = self.running.iter().map(pending).collect();
        let prompts = self.running.iter().filter(|running| running.is_in_prompt());
        let prompts: Vec<usize> = prompts.map(left).collect();
        let writing = self.running.len() - prompts.len();
        let budget = budget(&prompts, writing, self.shared.config.prompt_share);
        shares(&pending, writing + budget)
    }

    /// Takes out what has ended.
    fn settle(&mut self) {
        let counters = &self.shared.counters;
        for mut ended in self.running.extract_if(.., |running| running.end.is_some()) {
            if !matches!(ended.end, Some(End::Deadline | End::Aborted)) {
                add(&counters.finished, 1);
            }
            let usage = ended.usage();
            if let Some(end) = ended.end {
                (ended.sink)(Event::End(end, usage));
            }
            self.prefixes.insert(&ended.text, ended.sequence);
        }
        set(&counters.running, self.running.len());
        set(&counters.kv_bytes, self.kv_bytes());
    }
}

impl Running {
    /// Whether ids of the prompt are left to be seen.
    fn is_in_prompt(&self) -> bool {
        self.sequence.positions() < self.request.prompt.len()
    }

    fn wants_prompt_logprobs(&self) -> bool {
        let request = &self.request;
        request.prompt_logprobs && request.embedding.is_none() && self.is_in_prompt()
    }

    fn usage(&self) -> Usage {
        let prompt = self.request.prompt.len();
        Usage { prompt, cached: self.cached, generated: self.text.len() - prompt }
    }

    /// Goes on after a pass that took `count` ids and gave `logits`, `(1 or count, V)` or none.
    fn follow(&mut self, count: usize, logits: &[f32], vocab: usize) {
        let seen = self.sequence.positions();
        let prompt = self.request.prompt.len();
        let wanted = self.request.prompt_logprobs && self.request.embedding.is_none();
        if wanted && seen <= prompt {
            let top = self.request.logprobs.unwrap_or(0);
            let next = self.request.prompt[seen - count + 1..].iter();
            let rows = logits.chunks_exact(vocab).zip(next);
            self.prompt.extend(rows.map(|(row, &id)| Logprob::new(row, id, top)));
            if seen == prompt {
                let prompt = std::mem::take(&mut self.prompt);
                (self.sink)(Event::Prompt(prompt));
            }
        }
        if let Some(pooling) = self.request.embedding {
            self.pool(pooling, logits, logits.len() / count.max(1));
        }
        if seen < self.text.len() {
            return;
        }
        if self.request.max_tokens == 0 {
            self.end = Some(End::Length);
            return;
        }
        let last = logits.len().saturating_sub(vocab);
        match self.chooser.choose(&logits[last..], &self.text) {
            Ok(token) => self.push(token),
            Err(_) => self.end = Some(End::Failed),
        }
    }

    /// Takes hidden states `(T, D)` of the prompt into account, and gives them out after the last.
    fn pool(&mut self, pooling: Pooling, hidden: &[f32], width: usize) {
        let prompt = self.request.prompt.len();
        self.pooled.resize(width, 0.0);
        for row in hidden.chunks_exact(width) {
            match pooling {
                Pooling::Last => self.pooled.copy_from_slice(row),
                Pooling::Mean => {
                    let share = |(sum, x): (&mut f32, &f32)| *sum += x / prompt as f32;
                    self.pooled.iter_mut().zip(row).for_each(share);
                }
            }
        }
        if self.sequence.positions() == prompt {
            (self.sink)(Event::Embedding(std::mem::take(&mut self.pooled)));
        }
    }

    fn push(&mut self, token: Token) {
        if self.request.stop.contains(&token.id) {
            self.end = Some(End::Stop);
            return;
        }
        self.text.push(token.id);
        (self.sink)(Event::Token(token));
        if self.text.len() - self.request.prompt.len() == self.request.max_tokens {
            self.end = Some(End::Length);
        }
    }
}

fn turn_away(mut waiting: Waiting, end: End) {
    let usage = Usage { prompt: waiting.request.prompt.len(), ..Usage::default() };
    (waiting.sink)(Event::End(end, usage));
}

fn passed(request: &Request, now: Instant) -> bool {
    request.deadline.is_some_and(|deadline| now >= deadline)
}

/// How many ids of prompts go through the model next, when so many of each are left. Beside texts that
/// are generated, `share`; otherwise many, but for when a prompt that is as short as that waits beside
/// longer ones: then it has its answer begun in a short pass.
fn budget(left: &[usize], writing: usize, share: usize) -> usize {
    let (short, long): (Vec<usize>, Vec<usize>) = left.iter().partition(|left| **left <= share);
    let (of_short, long) = (short.iter().sum::<usize>(), long.len());
    match writing {
        0 if of_short > 0 && long > 0 => (of_short + share * long).min(ALONE),
        0 => ALONE,
        _ => share,
    }
}

/// Divides `budget` ids among those who have so many left, as equally as can be: who needs less
/// leaves more for the others. All get at least one.
fn shares(pending: &[usize], budget: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..pending.len()).collect();
    order.sort_by_key(|&i| pending[i]);
    let (mut shares, mut left) = (vec![0; pending.len()], budget);
    for (rank, &i) in order.iter().enumerate() {
        let share = (left / (pending.len() - rank)).max(1);
        shares[i] = pending[i].min(share);
        left = left.saturating_sub(shares[i]);
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_equal_but_for_those_who_need_less() {
        assert_eq!(shares(&[2000], 256), [256]);
        assert_eq!(shares(&[2000, 10], 64), [54, 10]);
        assert_eq!(shares(&[1, 500, 1, 500], 66), [1, 32, 1, 32]);
        assert_eq!(shares(&[5; 4], 2), [1; 4]);
        assert_eq!(shares(&[3, 3], 100), [3, 3]);
        assert!(shares(&[], 10).is_empty());
    }

    #[test]
    fn a_short_prompt_does_not_wait_for_a_long_pass() {
        assert_eq!(budget(&[2000], 0, 64), ALONE);
        assert_eq!(budget(&[2000, 8], 0, 64), 72);
        assert_eq!(shares(&[2000, 8], 72), [64, 8]);
        assert_eq!(budget(&[8; 20], 0, 64), ALONE);
        assert_eq!(budget(&[2000, 2000, 60, 60, 60], 0, 64), ALONE);
        assert_eq!(budget(&[2000, 8], 3, 64), 64);
    }
}
