//! Damaged and malicious files end in an error that names the damage, never in a panic.

#![allow(clippy::unwrap_used)]

mod blocks;
#[path = "../common/mod.rs"]
mod common;
mod directories;
mod gguf;
