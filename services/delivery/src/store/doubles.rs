//! Parts of the port that a test's store has no business with: macros that implement them.

/// The part of the port that a test's store has no business with.
macro_rules! schedules_nothing {
    () => {
        fn expire(
            &self,
            _: u64,
            _: usize,
        ) -> ::futures::future::BoxFuture<'static, Result<$crate::store::Expired, $crate::store::StoreError>>
        {
            unreachable!("nothing expires here")
        }

        fn schedule(
            &self,
            _: Vec<$crate::store::Scheduled>,
        ) -> ::futures::future::BoxFuture<
            'static,
            Vec<Result<$crate::store::ScheduledAt, $crate::store::AppendError>>,
        > {
            unreachable!("nothing is scheduled here")
        }

        fn claim_scheduled(
            &self,
            _: u64,
            _: u64,
            _: usize,
        ) -> ::futures::future::BoxFuture<
            'static,
            Result<Vec<$crate::store::Scheduled>, $crate::store::StoreError>,
        > {
            unreachable!("nothing is scheduled here")
        }

        fn postpone(
            &self,
            _: Vec<(String, ::uuid::Uuid)>,
            _: u64,
        ) -> ::futures::future::BoxFuture<'static, Result<(), $crate::store::StoreError>> {
            unreachable!("nothing is scheduled here")
        }

        fn unschedule(
            &self,
            _: Vec<(String, ::uuid::Uuid)>,
        ) -> ::futures::future::BoxFuture<'static, Result<u64, $crate::store::StoreError>> {
            unreachable!("nothing is scheduled here")
        }
    };
}
pub(crate) use schedules_nothing;

/// The part of the port that a test's store without devices has no business with.
macro_rules! knows_no_devices {
    () => {
        fn register(
            &self,
            _: Vec<(String, String)>,
        ) -> ::futures::future::BoxFuture<'static, Vec<Result<(), $crate::store::RegisterError>>> {
            unreachable!("no device is registered here")
        }

        fn forget_devices(
            &self,
            _: u64,
            _: usize,
        ) -> ::futures::future::BoxFuture<'static, Result<$crate::store::Forgotten, $crate::store::StoreError>>
        {
            unreachable!("no device is forgotten here")
        }
    };
}
pub(crate) use knows_no_devices;
