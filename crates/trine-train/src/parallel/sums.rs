//! Gradients that are summed over a group in buckets, while a backward pass makes more of them.
//!
//! The gradients of a step are one stream of numbers, in the order in which a backward pass by layers makes
//! them, which is the same for all processes. The stream is cut into buckets; a thread of its own sums one
//! after the other, while the pass goes on. So no process has to know how another one has come to its
//! gradients, or whether it has any; and what is on its way takes a bounded amount of memory.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use candle_core::Tensor;
use trine_format::names::TensorId;

use super::{Group, GroupError};
use crate::fused::zeros;
use crate::ops::view;
use crate::optimizer::{Gradients, in_place};
use crate::{Params, TrainError};

/// Numbers of a bucket: enough for the bandwidth of a network to be used, few enough for the last one, which
/// nothing is computed beside, to be soon over.
const BUCKET: usize = 1 << 22;

/// Buckets that are on their way at most.
const ON_THE_WAY: usize = 16;

/// Sums the gradients of one step after the other.
pub(crate) struct Sums {
    /// Names of the gradients in the order of the stream.
    order: Vec<String>,
    /// Where sums lie whose summands did not lie all together.
    kept: Gradients,
    /// Buckets that are not in use.
    free: Vec<Vec<f32>>,
    /// Numbers of a bucket.
    bucket: usize,
}

impl Sums {
    /// Of gradients of `params`.
    pub(crate) fn new(params: &Params) -> Self {
        let mut order: Vec<String> = params.iter().map(|(name, _)| name.to_owned()).collect();
        // Layers from the last to the first, then what is in none; each part by name.
        order.sort_by_key(|name| match TensorId::from_canonical(name) {
            Some(TensorId::Layer(layer, _)) => (0, usize::MAX - layer),
            _ => (1, 0),
        });
        Self { order, kept: Gradients::new(), free: Vec::new(), bucket: BUCKET }
    }

    /// Sums gradients that are all there, in place.
    pub(crate) fn whole(
        &mut self,
        group: &dyn Group,
        gradients: &Gradients,
    ) -> Result<(), TrainError> {
        self.stream(group, gradients, |stream| stream.put(gradients))
    }

    /// Sums gradients that `make` makes in parts, layer by layer from the last on and then the others, and
    /// puts into the stream. Returns what it returns, and the sums, which are those of this step until the
    /// next.
    pub(crate) fn by_layer<T>(
        &mut self,
        group: &dyn Group,
        params: &Params,
        make: impl FnOnce(&mut Stream<'_>) -> Result<T, TrainError>,
    ) -> Result<(T, Gradients), TrainError> {
        let fits = |(name, var): (&str, &candle_core::Var)| {
            self.kept.get(name).is_some_and(|kept| kept.shape() == var.shape())
        };
        if !params.iter().all(fits) {
            self.kept = zeros(params)?;
        }
        let kept = self.kept.clone();
        let made = self.stream(group, &kept, make)?;
        Ok((made, kept))
    }

    /// Takes part in the sums of a step without gradients of its own.
    pub(crate) fn nothing(
        &mut self,
        group: &dyn Group,
        params: &Params,
    ) -> Result<Gradients, TrainError> {
        Ok(self.by_layer(group, params, |stream| stream.put_zeros())?.1)
    }

    /// Lets `make` fill a stream whose sums go to `sums`.
    fn stream<T>(
        &mut self,
        group: &dyn Group,
        sums: &Gradients,
        make: impl FnOnce(&mut Stream<'_>) -> Result<T, TrainError>,
    ) -> Result<T, TrainError> {
        let ((to, filled), (back, summed)) = (channel(), channel());
        thread::scope(|scope| {
            let summing = scope.spawn(move || sum_all(group, &filled, &back));
            let mut stream = Stream {
                order: &self.order,
                sums,
                next: 0,
                arrived: (0, 0),
                open: self.free.pop().unwrap_or_default(),
                free: &mut self.free,
                bucket: self.bucket,
                on_the_way: 0,
                to,
                summed,
                broken: false,
            };
            let made = make(&mut stream).and_then(|made| stream.finish().map(|()| made));
            let broken = stream.broken;
            // Without a sender the thread ends after the bucket that it is at.
            drop(stream);
            let ended = summing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            match made {
                Err(e) if !broken => Err(e),
                made => {
                    ended?;
                    made
                }
            }
        })
    }
}

/// Sums the buckets that come, and gives them back.
fn sum_all(
    group: &dyn Group,
    filled: &Receiver<Vec<f32>>,
    back: &Sender<Vec<f32>>,
) -> Result<(), GroupError> {
    for mut bucket in filled {
        group.sum(&mut bucket)?;
        if back.send(bucket).is_err() {
            break;
        }
    }
    Ok(())
}

/// The gradients of a step on their way to be summed.
pub(crate) struct Stream<'a> {
    order: &'a [String],
    /// Where the sums go.
    sums: &'a Gradients,
    /// Which of `order` is to be put next.
    next: usize,
    /// Which of `order` the next sums are of, and of which element on.
    arrived: (usize, usize),
    /// The bucket that is being filled.
    open: Vec<f32>,
    free: &'a mut Vec<Vec<f32>>,
    bucket: usize,
    on_the_way: usize,
    to: Sender<Vec<f32>>,
    summed: Receiver<Vec<f32>>,
    /// Whether the thread that sums has ended too early.
    broken: bool,
}

impl Stream<'_> {
    /// Puts the gradients that come next.
    ///
    /// # Errors
    /// Others than those, and a process that is gone.
    pub(crate) fn put(&mut self, part: &Gradients) -> Result<(), TrainError> {
        let order = self.order;
        for name in order.iter().skip(self.next).take(part.len()) {
            let fitting = part.get(name).filter(|g| g.shape() == self.sums[name].shape());
            let Some(gradient) = fitting else {
                let message = format!("{name} has no gradient of its shape to be summed");
                return Err(candle_core::Error::Msg(message).into());
            };
            self.put_some(gradient.elem_count(), |open, from, to| {
                open.extend_from_slice(&view(gradient)?[from..to]);
                Ok(())
            })?;
        }
        self.next += part.len();
        Ok(())
    }

    /// Puts zeros for all gradients.
    fn put_zeros(&mut self) -> Result<(), TrainError> {
        let count = self.sums.values().map(Tensor::elem_count).sum();
        self.next = self.order.len();
        self.put_some(count, |open, from, to| {
            open.resize(open.len() + (to - from), 0.0);
            Ok(())
        })
    }

    /// Puts `count` numbers, of which `add` adds some to a bucket. A gradient may share memory with a sum, so
    /// nothing is borrowed while sums arrive.
    fn put_some(
        &mut self,
        count: usize,
        add: impl Fn(&mut Vec<f32>, usize, usize) -> candle_core::Result<()>,
    ) -> Result<(), TrainError> {
        let mut from = 0;
        while from < count {
            let to = count.min(from + self.bucket - self.open.len());
            add(&mut self.open, from, to)?;
            from = to;
            if self.open.len() == self.bucket {
                self.send()?;
            }
        }
        Ok(())
    }

    fn send(&mut self) -> Result<(), TrainError> {
        let empty = self.free.pop().unwrap_or_default();
        let filled = std::mem::replace(&mut self.open, empty);
        if self.to.send(filled).is_err() {
            return self.breaks();
        }
        self.on_the_way += 1;
        while let Ok(bucket) = self.summed.try_recv() {
            self.arrive(bucket)?;
        }
        self.wait(ON_THE_WAY)
    }

    /// Waits until no more than so many buckets are on their way.
    fn wait(&mut self, most: usize) -> Result<(), TrainError> {
        while self.on_the_way > most {
            match self.summed.recv() {
                Ok(bucket) => self.arrive(bucket)?,
                Err(_) => return self.breaks(),
            }
        }
        Ok(())
    }

    /// Takes in sums.
    fn arrive(&mut self, mut bucket: Vec<f32>) -> Result<(), TrainError> {
        self.on_the_way -= 1;
        let mut values = bucket.as_slice();
        while !values.is_empty() {
            let (index, at) = self.arrived;
            let sum = &self.sums[&self.order[index]];
            let left = sum.elem_count() - at;
            let (now, rest) = values.split_at(left.min(values.len()));
            in_place(sum, |sum| sum[at..][..now.len()].copy_from_slice(now))?;
            self.arrived = if now.len() == left { (index + 1, 0) } else { (index, at + now.len()) };
            values = rest;
        }
        bucket.clear();
        self.free.push(bucket);
        Ok(())
    }

    /// Sends what is left, and waits for all sums.
    fn finish(&mut self) -> Result<(), TrainError> {
        if let Some(name) = self.order.get(self.next) {
            return Err(candle_core::Error::Msg(format!("{name} received no gradient")).into());
        }
        if !self.open.is_empty() {
            self.send()?;
        }
        self.wait(0)
    }

    /// The thread that sums has ended; what it says is the reason.
    fn breaks(&mut self) -> Result<(), TrainError> {
        self.broken = true;
        Err(candle_core::Error::Msg("gradients are no longer summed".to_owned()).into())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::parallel::Threads;

    const NAMES: [&str; 4] = [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
    ];

    fn params() -> Params {
        let var = |n: usize| Var::from_vec(vec![0f32; n], n, &Device::Cpu).unwrap();
        Params::from_vars(
            NAMES.iter().zip([7, 5, 5, 3]).map(|(name, n)| ((*name).to_owned(), var(n))),
        )
    }

    /// Gradients that tell name, element and process, each times `factor`.
    fn gradients(params: &Params, factor: f32) -> Gradients {
        let all = zeros(params).unwrap();
        for (i, gradient) in all.values().enumerate() {
            let value = |j: usize| factor * (100 * i + j) as f32;
            in_place(gradient, |g| g.iter_mut().enumerate().for_each(|(j, g)| *g = value(j)))
                .unwrap();
        }
        all
    }

    fn values(gradients: &Gradients) -> Vec<Vec<f32>> {
        gradients.values().map(|g| g.to_vec1().unwrap()).collect()
    }

    #[test]
    fn the_last_layer_comes_first_and_what_is_in_none_last() {
        let order = Sums::new(&params()).order;
        assert_eq!(order, [NAMES[2], NAMES[1], NAMES[0], NAMES[3]]);
    }

    #[test]
    fn whole_gradients_layers_and_nothing_are_summed_together_in_buckets_of_any_size() {
        for bucket in [1, 3, 4, 20, 100] {
            let members = Threads::group(3);
            let found: Vec<_> = thread::scope(|scope| {
                let one = |group: Threads| {
                    let params = params();
                    let mut sums = Sums { bucket, ..Sums::new(&params) };
                    let mut found = Vec::new();
                    for step in 1..4 {
                        let mine = gradients(&params, step as f32 * (1 << group.rank()) as f32);
                        found.push(values(&match group.rank() {
                            0 => {
                                sums.whole(&group, &mine).unwrap();
                                mine
                            }
                            1 => {
                                let part = |names: &[&str]| -> Gradients {
                                    let one =
                                        |name: &&str| ((*name).to_owned(), mine[*name].clone());
                                    names.iter().map(one).collect()
                                };
                                let make = |stream: &mut Stream<'_>| {
                                    stream.put(&part(&[NAMES[2]]))?;
                                    stream.put(&part(&[NAMES[1]]))?;
                                    stream.put(&part(&[NAMES[0], NAMES[3]]))
                                };
                                sums.by_layer(&group, &params, make).unwrap().1
                            }
                            _ => sums.nothing(&group, &params).unwrap(),
                        }));
                    }
                    found
                };
                let members: Vec<_> =
                    members.into_iter().map(|member| scope.spawn(move || one(member))).collect();
                members.into_iter().map(|member| member.join().unwrap()).collect()
            });
            let expected: Vec<_> =
                (1..4).map(|step| values(&gradients(&params(), 3.0 * step as f32))).collect();
            assert!(found.iter().all(|found| *found == expected), "{bucket}: {found:?}");
        }
    }

    #[test]
    fn a_gradient_that_is_missing_ends_all_without_waiting() {
        let mut members = Threads::group(2).into_iter();
        let (first, second) = (members.next().unwrap(), members.next().unwrap());
        let (params_of_first, params) = (params(), params());
        thread::scope(|scope| {
            let other = scope.spawn(move || {
                let all = gradients(&params_of_first, 1.0);
                Sums { bucket: 2, ..Sums::new(&params_of_first) }.whole(&first, &all).unwrap_err()
            });
            let mut some = gradients(&params, 1.0);
            some.remove(NAMES[1]);
            let sums = zeros(&params).unwrap();
            let mut mine = Sums { bucket: 2, ..Sums::new(&params) };
            let error = mine.stream(&second, &sums, |stream| stream.put(&some)).unwrap_err();
            assert!(error.to_string().contains(NAMES[1]), "{error}");
            drop(second);
            let error = other.join().unwrap().to_string();
            assert!(error.contains("process 1 has ended"), "{error}");
        });
    }
}
