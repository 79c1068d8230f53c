//! The contract of the store, run on both engines.

#[cfg(test)]
mod contract;
#[cfg(test)]
mod directory;
#[cfg(test)]
mod engine;
#[cfg(feature = "failpoints")]
#[cfg(test)]
mod kill;
#[cfg(test)]
mod object_store;
#[cfg(test)]
mod object_store_faults;
#[cfg(test)]
mod postgres;
#[cfg(test)]
mod stand_in;
#[cfg(test)]
mod uploads;
