//! One file a command.

pub(crate) mod bench;
pub(crate) mod chat;
pub(crate) mod convert;
pub(crate) mod data;
pub(crate) mod demo;
pub(crate) mod download;
pub(crate) mod eval;
pub(crate) mod finetune;
pub(crate) mod generate;
pub(crate) mod inspect;
pub(crate) mod logits;
pub(crate) mod report;
pub(crate) mod run;
pub(crate) mod serve;
pub(crate) mod synth_model;
pub(crate) mod tokenizer;
pub(crate) mod train;
pub(crate) mod verify;
