//! The other libraries and programs, a file each. tokio-postgres, deadpool-postgres and this crate are in the kit.

pub mod bb8;
pub mod diesel_async;
pub mod pgbench;
pub mod psql;
pub mod python;
pub mod sea_orm;
pub mod sqlx;
