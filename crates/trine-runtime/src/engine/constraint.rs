//! What a text must look like, told to the engine id by id.

use std::fmt::Debug;

/// Decides which ids may come next, e.g. those that go on with a grammar.
///
/// A copy of a request's constraint follows each text, so one that has begun is never shared.
pub trait Constraint: Debug + Send + Sync {
    /// Makes the logits `(V,)` of ids that may not come next `-inf`. An id that ends the text may come where
    /// the text is whole.
    ///
    /// # Errors
    /// Why nothing may come next.
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String>;

    /// Takes notice of the id that was chosen.
    ///
    /// # Errors
    /// Why it cannot be followed.
    fn accept(&mut self, id: u32) -> Result<(), String>;

    /// A copy in the same state.
    fn boxed(&self) -> Box<dyn Constraint>;
}

impl Clone for Box<dyn Constraint> {
    fn clone(&self) -> Self {
        (**self).boxed()
    }
}
