//! The values of one row, on their way to the server: a row of a COPY, or the parameters of one statement.

use bytes::{BufMut, BytesMut};
use postgres_types::{BorrowToSql, Format, IsNull, ToSql, Type};

/// The values of one row: of one that COPY stores, or the parameters of a statement in a [`Batch`](crate::Batch) or
/// of `execute_many`.
///
/// Tuples of up to sixteen values; arrays, slices and `Vec`s of values of one type or of `&(dyn ToSql + Sync)` or
/// `Box<dyn ToSql + Sync>`; `()` for none; references to all of them; and your own types:
///
/// ```
/// use pg_session::{FieldWriter, Record};
///
/// struct Item {
///     name: String,
///     price_cents: i64,
/// }
///
/// impl Record for Item {
///     fn write(&self, fields: &mut FieldWriter<'_>) {
///         fields.field(&self.name);
///         fields.field(&self.price_cents);
///     }
/// }
/// ```
pub trait Record {
    /// Writes the values, in the order of the columns or parameters.
    fn write(&self, fields: &mut FieldWriter<'_>);
}

impl<R: Record + ?Sized> Record for &R {
    fn write(&self, fields: &mut FieldWriter<'_>) {
        (**self).write(fields);
    }
}

impl<T: BorrowToSql> Record for [T] {
    fn write(&self, fields: &mut FieldWriter<'_>) {
        for value in self {
            fields.field(value.borrow_to_sql());
        }
    }
}

impl<T: BorrowToSql, const N: usize> Record for [T; N] {
    fn write(&self, fields: &mut FieldWriter<'_>) {
        self.as_slice().write(fields);
    }
}

impl<T: BorrowToSql> Record for Vec<T> {
    fn write(&self, fields: &mut FieldWriter<'_>) {
        self.as_slice().write(fields);
    }
}

impl Record for () {
    fn write(&self, _: &mut FieldWriter<'_>) {}
}

macro_rules! tuples {
    () => {};
    ($first:ident $($rest:ident)*) => {
        impl<$first: ToSql, $($rest: ToSql),*> Record for ($first, $($rest,)*) {
            fn write(&self, fields: &mut FieldWriter<'_>) {
                #[allow(non_snake_case, reason = "a value is called as its type is")]
                let ($first, $($rest,)*) = self;
                fields.field($first);
                $(fields.field($rest);)*
            }
        }
        tuples!($($rest)*);
    };
}
tuples!(A B C D E F G H I J K L M N O P);

/// Takes the values of one row. See [`Record`].
#[derive(Debug)]
pub struct FieldWriter<'a> {
    types: &'a [Type],
    out: &'a mut BytesMut,
    written: usize,
    failed: Option<Cause>,
}

type Cause = Box<dyn std::error::Error + Sync + Send>;

/// Why a record does not fit.
#[derive(Debug)]
pub(crate) enum Misfit {
    /// The value of this field, counted from 0, could not be converted.
    Value(usize, Cause),
    /// It has so many.
    Count(usize),
}

impl FieldWriter<'_> {
    /// The next value. What is wrong with it is told by the COPY or batch as a whole.
    pub fn field(&mut self, value: &dyn ToSql) {
        if self.failed.is_some() {
            return;
        }
        if let Some(ty) = self.types.get(self.written) {
            if let Err(cause) = self.encode(value, ty) {
                self.failed = Some(cause);
                return;
            }
        }
        self.written += 1;
    }

    fn encode(&mut self, value: &dyn ToSql, ty: &Type) -> Result<(), Cause> {
        if let Format::Text = value.encode_format(ty) {
            return Err("it is written as text, and only the binary format can be sent here".into());
        }
        let start = self.out.len();
        self.out.put_i32(-1); // NULL, unless a length takes its place
        if let IsNull::No = value.to_sql_checked(ty, self.out)? {
            let length = i32::try_from(self.out.len() - start - 4)?;
            self.out[start..start + 4].copy_from_slice(&length.to_be_bytes());
        }
        Ok(())
    }
}

/// Writes a record as COPY and Bind both have it: the number of its fields, then the length and the bytes of each.
pub(crate) fn encode<R: Record + ?Sized>(
    types: &[Type],
    out: &mut BytesMut,
    record: &R,
) -> Result<(), Misfit> {
    // A table has 1600 columns at most and a statement 65535 parameters, so the number fits.
    out.put_u16(types.len() as u16);
    let mut fields = FieldWriter { types, out, written: 0, failed: None };
    record.write(&mut fields);
    match fields.failed {
        Some(cause) => Err(Misfit::Value(fields.written, cause)),
        None if fields.written == types.len() => Ok(()),
        None => Err(Misfit::Count(fields.written)),
    }
}
